"""Settings: immutable, checked once on rank 0, then broadcast to all ranks."""

from dataclasses import asdict, dataclass, field
from typing import Any

DTYPES = ("float32", "bfloat16")
MIGRATE = ("never", "auto", "stress")
DEVICE_BUFFERS = ("auto", "never")
CHECKSUMS = ("auto", "always", "never")
DEMO_KV_BYTES = 40 << 20  # KV cache of a worker in the demo: holds about seven requests


class UsageError(Exception):
    """A mistake of the user. The message says what to type instead; the exit code is 2."""


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights to serve and in which precision."""

    model: str = "smollm2"  # directory, .gguf file, hub name, `smollm2`, or random:CONFIG
    served_model_name: str | None = None  # None: the value of `model`
    dtype: str = "bfloat16"  # of weights and KV
    max_model_len: int | None = None  # prompt + output tokens; None: the model's own limit
    chat_template: str | None = None  # a Jinja file; None: the tokenizer's own
    seed: int = 0  # of random weights

    def __post_init__(self) -> None:
        _check(
            self.dtype in DTYPES, f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype}"
        )
        _check(
            self.max_model_len is None or self.max_model_len > 0, "--max-model-len must be over 0"
        )

    @property
    def name(self) -> str:
        """Name that requests use."""
        return self.served_model_name or self.model


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV arena of one worker."""

    block_size: int = 16  # tokens of a block
    kv_cache_memory_bytes: int | None = None  # None: a share of the GPU, or 1 GiB on a CPU
    gpu_memory_utilization: float = 0.9  # that share, weights included; in (0, 1]
    enable_prefix_caching: bool = False

    def __post_init__(self) -> None:
        _check(self.block_size > 0, f"--block-size must be at least 1, not {self.block_size}")
        share = self.gpu_memory_utilization
        _check(0 < share <= 1, f"--gpu-memory-utilization must be in (0, 1], not {share}")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much one worker computes in one step."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    target_step_ms: float | None = None  # None: twice a step of decodes alone, at least 50

    def __post_init__(self) -> None:
        _check(self.max_num_seqs > 0, "--max-num-seqs must be at least 1")
        _check(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "--max-num-batched-tokens must not be below --max-num-seqs "
            f"({self.max_num_batched_tokens} < {self.max_num_seqs})",
        )
        target_ms = self.target_step_ms
        _check(
            target_ms is None or 0 < target_ms < float("inf"),
            f"--target-step-ms must be over 0, not {target_ms}",
        )

    @property
    def target_step_s(self) -> float | None:
        return None if self.target_step_ms is None else self.target_step_ms / 1000


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How requests are placed and moved."""

    policy: str = "frugal"
    migrate: str = "auto"  # never, auto: as the policy decides, stress: at random
    seed: int = 0  # of --migrate stress
    rebalance_every_s: float = 0.1  # shortest time between two looks at the whole cluster
    park_after_s: float = 1.0  # time after which an empty worker may be parked
    migration_limit_s: float = 1.0  # a longer migration is deferred until others have ended
    max_ttft_s: float | None = None  # expected first tokens later than this are refused; None: none
    thrift: float = 0.5  # of `frugal`: 0 moves the fewest bytes, 1 uses the fewest workers

    def __post_init__(self) -> None:
        _check(0 <= self.thrift <= 1, f"--thrift must be in [0, 1], not {self.thrift}")
        _check(self.migration_limit_s > 0, "--migration-limit-s must be over 0")
        limit_s = self.max_ttft_s
        _check(limit_s is None or limit_s > 0, f"--max-ttft-s must be over 0, not {limit_s}")
        _check(self.migrate in MIGRATE, f"--migrate must be one of {', '.join(MIGRATE)}")


@dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """How messages and KV blocks are sent."""

    idle_poll_s: float = 0.005  # longest sleep between polls of a link without a doorbell
    device_buffers: str = "auto"  # auto: where a self-test passes; never: staged in host memory
    checksums: str = "auto"  # of KV blocks in transfer; auto: between hosts
    measure_links: bool = True  # at the start, for about a second

    def __post_init__(self) -> None:
        _check(
            self.device_buffers in DEVICE_BUFFERS,
            f"--device-buffers must be one of {', '.join(DEVICE_BUFFERS)}",
        )
        _check(self.checksums in CHECKSUMS, f"--checksums must be one of {', '.join(CHECKSUMS)}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings, equal on every rank."""

    models: tuple[ModelConfig, ...] = (ModelConfig(),)  # the first one is the default of requests
    worker_models: tuple[tuple[str, ...], ...] = ()  # hosted models; (): all, by every worker
    cache: CacheConfig = field(default_factory=CacheConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    threads: int | None = None  # compute threads of a rank; None: cores of the host / its ranks
    device: str = "auto"  # auto: CUDA where there is a GPU; cpu; cuda
    oversubscribe_gpus: bool = False  # workers may share a GPU

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        twice = next((name for name in names if names.count(name) > 1), None)
        _check(twice is None, f"two models are called {twice}: give each a --served-model-name")
        _check(
            len(names) == 1 or self.model.chat_template is None,
            "--chat-template goes with one --model",
        )
        for name in (name for hosted in self.worker_models for name in hosted):
            _check(name in names, f"--worker-models {name}: there are {', '.join(names)}")

    @property
    def model(self) -> ModelConfig:
        """The default model of requests."""
        return self.models[0]

    def hosted(self, worker: int) -> tuple[str, ...]:
        """Names of the models that this worker, 1 or higher, hosts."""
        if not self.worker_models:
            return tuple(model.name for model in self.models)
        return self.worker_models[(worker - 1) % len(self.worker_models)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the broadcast."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Config":
        """The configuration that `to_dict` wrote."""
        sections = {
            "cache": CacheConfig,
            "batch": BatchConfig,
            "cluster": ClusterConfig,
            "transport": TransportConfig,
        }
        given = {k: sections[k](**v) if k in sections else v for k, v in data.items()}
        given["models"] = tuple(ModelConfig(**model) for model in data["models"])
        given["worker_models"] = tuple(tuple(hosted) for hosted in data["worker_models"])
        return Config(**given)


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """The HTTP server; only rank 0 has it."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    api_server_count: int = 1  # processes that speak HTTP
    shutdown_timeout: float = 30.0  # seconds in which requests may end after SIGTERM
    metrics_vllm_names: bool = False  # /metrics has vLLM's names beside ours
    api_key: list[str] = field(default_factory=list, repr=False)  # with all scopes
    api_key_file: str | None = None  # more keys: see `mellmpi.keys`
    allow_unauthenticated: bool = False  # without keys, at an address that others can reach
    ssl_certfile: str | None = None  # PEM
    ssl_keyfile: str | None = None  # PEM; None: in ssl_certfile
    allowed_origins: tuple[str, ...] = ()  # CORS
    access_log: str | None = None  # file, or "-" for standard error
    batch_dir: str | None = None  # of files and batches; None: there are none

    def __post_init__(self) -> None:
        _check(0 <= self.port < 65536, f"--port must be 0 … 65535, not {self.port}")
        _check(self.api_server_count > 0, "--api-server-count must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Options:
    """A command with its settings and files; only rank 0 has them."""

    command: str  # "serve", "run-batch", "demo" or "pipe"
    config: Config
    http: HttpConfig = field(default_factory=HttpConfig)
    input_file: str | None = None
    output_file: str | None = None
    request_rate: float | None = None  # requests per second; None: all at once
    replay: str | None = None  # a trace; replaces input_file
    rate_scale: float | None = None  # factor for a replay's arrivals; None: 1
    length_scale: float | None = None  # factor for a replay's lengths; None: 1
    max_requests: int | None = None
    report: str | None = None
    timeline: str | None = None
    trace_out: str | None = None
    show: int = 0  # number of answers to print
    cache_dir: str | None = None  # None: the user's cache directory

    def __post_init__(self) -> None:
        scales = {
            "--rate-scale": self.rate_scale,
            "--length-scale": self.length_scale,
            "--max-requests": self.max_requests,
        }
        given = [flag for flag, value in scales.items() if value is not None]
        if self.replay is None and given:
            raise ValueError(f"{given[0]} goes with --replay TRACE")
        if self.replay is not None:
            self._check_replay()

    def _check_replay(self) -> None:
        if self.input_file is not None:
            raise ValueError("requests come from -i FILE or from --replay TRACE: leave one out")
        if self.request_rate is not None:
            raise ValueError(
                "a replay has the arrivals of its trace; in place of --request-rate, "
                "--rate-scale X makes them X times as fast"
            )
