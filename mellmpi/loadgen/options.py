"""Options of the command `bench serve`, checked."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mellmpi.files import visible

ENDPOINTS = {  # backend -> path; "vllm" is vLLM's own name of "openai"
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
METRICS = ("ttft", "tpot", "itl", "e2el")
PICTURES = (".png", ".pdf", ".svg", ".jpg")
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logprobs",
)
GOES_WITH = {  # flag -> datasets that it is for
    "random_input_len": ("random",),
    "random_output_len": ("random",),
    "random_range_ratio": ("random",),
    "random_prefix_len": ("random",),
    "sharegpt_output_len": ("sharegpt",),
    "custom_output_len": ("custom",),
    "disable_shuffle": ("sharegpt", "custom"),
    "no_oversample": ("sharegpt", "custom"),
    "rate_scale": ("trace",),
    "length_scale": ("trace",),
}
DEFAULT_PROMPTS = 1000


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Server, requests, arrivals and outputs of a run. ValueError names the flag to change."""

    base_url: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    endpoint: str | None = None
    backend: str = "openai"
    model: str | None = None  # None: the first that the server lists
    served_model_name: str | None = None
    tokenizer: str | None = None
    header: list[tuple[str, str]] = field(default_factory=list)
    extra_body: dict[str, Any] = field(default_factory=dict)
    insecure: bool = False
    api_key: str | None = field(default=None, repr=False)

    dataset_name: str = "random"
    dataset_path: str | None = None
    num_prompts: int | None = None  # None: DEFAULT_PROMPTS, of a trace all
    seed: int = 0
    prompt_form: str = "text"
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    sharegpt_output_len: int | None = None
    custom_output_len: int | None = None
    disable_shuffle: bool = False
    no_oversample: bool = False
    length_scale: float | None = None
    ignore_eos: bool | None = None  # None: only where the dataset gives the lengths of answers
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logprobs: int | None = None

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    rate_scale: float | None = None
    num_warmups: int = 0
    ready_check_timeout_sec: float = 0.0

    goodput: list[tuple[str, float]] = field(default_factory=list)  # milliseconds
    percentile_metrics: tuple[str, ...] = METRICS
    metric_percentiles: tuple[float, ...] = (99.0,)
    save_result: bool = False
    save_detailed: bool = False
    result_dir: str | None = None
    result_filename: str | None = None
    label: str | None = None
    metadata: list[tuple[str, str]] = field(default_factory=list)
    plot: str | None = None
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        self._check_server()
        self._check_dataset()
        self._check_arrivals()
        self._check_outputs()

    def _check_server(self) -> None:
        if self.base_url is not None:
            try:
                url = urlsplit(self.base_url)
                known = url.scheme in ("http", "https") and url.hostname and (url.port or 1)
            except ValueError:  # not a port
                known = None
            if not known:
                raise ValueError(
                    f"--base-url {visible(self.base_url)} must be like http://127.0.0.1:8000"
                )
        if self.endpoint is not None and not self.endpoint.startswith("/"):
            raise ValueError(f"--endpoint {visible(self.endpoint)} must begin with /")

    def _check_dataset(self) -> None:
        name = self.dataset_name
        if (self.dataset_path is None) != (name == "random"):
            raise ValueError(
                "--dataset-path goes with --dataset-name sharegpt, custom or trace"
                if name == "random"
                else f"--dataset-name {name} needs --dataset-path FILE"
            )
        for flag, datasets in GOES_WITH.items():
            is_given = getattr(self, flag) != type(self).__dataclass_fields__[flag].default
            if name not in datasets and is_given:
                raise ValueError(
                    f"--{_typed(flag)} goes with --dataset-name {' or '.join(datasets)}"
                )
        if self.prompt_form == "ids" and (name not in ("random", "trace") or self.is_chat):
            raise ValueError(
                "--prompt-form ids goes with --dataset-name random or trace and --backend openai"
            )

    def _check_arrivals(self) -> None:
        if self.dataset_name == "trace" and math.isfinite(self.request_rate):
            raise ValueError(
                "a trace has its own arrivals; in place of --request-rate, --rate-scale X makes "
                "them X times as fast"
            )
        if self.burstiness != 1 and math.isinf(self.request_rate):
            raise ValueError("--burstiness goes with --request-rate R")

    def _check_outputs(self) -> None:
        for flag in ("save_detailed", "result_dir", "result_filename", "metadata", "label"):
            if getattr(self, flag) and not self.save_result:
                raise ValueError(f"--{_typed(flag)} goes with --save-result")
        if self.plot is not None and Path(self.plot).suffix.lower() not in PICTURES:
            raise ValueError(
                f"--plot {visible(self.plot)}: its name must end with the kind of "
                f"picture, one of {' '.join(PICTURES)}"
            )

    @property
    def is_chat(self) -> bool:
        return self.backend == "openai-chat"

    @property
    def server(self) -> str:
        """URL of the server without /v1, which is part of the endpoints."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        url = (self.base_url or f"http://{host}:{self.port}").rstrip("/")
        return url.removesuffix("/v1")

    @property
    def url(self) -> str:
        """URL that requests are sent to."""
        return self.server + (self.endpoint or ENDPOINTS[self.backend])

    @property
    def sends_ignore_eos(self) -> bool:
        """Whether answers shall have exactly the length that the dataset gives them."""
        if self.ignore_eos is None:
            return self.dataset_name in ("random", "trace")
        return self.ignore_eos


def _typed(field_name: str) -> str:
    return field_name.replace("_", "-")
