"""Settings: frozen, checked once on rank 0, broadcast, handed down in sections."""

from dataclasses import asdict, dataclass, field
from typing import Any

DTYPES = ("float32", "bfloat16")
MIGRATE = ("never", "auto", "stress")
DEVICE_BUFFERS = ("auto", "never")
CHECKSUMS = ("auto", "always", "never")
DEMO_KV_BYTES = 40 << 20  # of each worker: some seven of the demo's requests


class UsageError(Exception):
    """The user's mistake: the message says what to type instead; exit code 2."""


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights to serve and in which precision."""

    model: str = "smollm2"  # directory, .gguf file, hub name, `smollm2`, or random:CONFIG
    served_model_name: str | None = None  # None: the model's own name
    dtype: str = "bfloat16"  # of weights and KV
    max_model_len: int | None = None  # prompt + output tokens; None: what the model was made for
    chat_template: str | None = None  # a file; None: the tokenizer's own
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
        return self.served_model_name or self.model


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The paged KV arena of one worker."""

    block_size: int = 16  # tokens a block
    kv_cache_memory_bytes: int | None = None  # None: a share of the device, or 1 GiB on a CPU
    gpu_memory_utilization: float = 0.9
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
    target_step_ms: float | None = None  # None: twice a step that only decodes, at least 50

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
    migrate: str = "auto"
    seed: int = 0  # of --migrate stress
    rebalance_every_s: float = 0.1  # at most so often the policy looks at the whole cluster
    horizon_s: float = 2.0  # placement keeps room for so many seconds of growth
    park_after_s: float = 1.0  # a worker empty for so long may be parked
    migration_limit_s: float = 1.0  # moves that would take longer wait until others have ended
    thrift: float = 0.5  # of `frugal`: 0 moves the fewest bytes, 1 uses the fewest workers

    def __post_init__(self) -> None:
        _check(0 <= self.thrift <= 1, f"--thrift must be in [0, 1], not {self.thrift}")
        _check(self.migration_limit_s > 0, "--migration-limit-s must be over 0")
        _check(self.migrate in MIGRATE, f"--migrate must be one of {', '.join(MIGRATE)}")


@dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """How bytes travel."""

    idle_poll_s: float = 0.005  # longest sleep between looks at a link that cannot ring
    device_buffers: str = "auto"  # auto: where a self-test passes; never: always staged
    checksums: str = "auto"  # of every KV block on its way. auto: between hosts
    measure_links: bool = True  # at the start, in about a second

    def __post_init__(self) -> None:
        _check(
            self.device_buffers in DEVICE_BUFFERS,
            f"--device-buffers must be one of {', '.join(DEVICE_BUFFERS)}",
        )
        _check(self.checksums in CHECKSUMS, f"--checksums must be one of {', '.join(CHECKSUMS)}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole, as rank 0 built it and every rank received it."""

    models: tuple[ModelConfig, ...] = (ModelConfig(),)  # requests that name none are for the first
    worker_models: tuple[tuple[str, ...], ...] = ()  # what workers host; (): all of them all
    cache: CacheConfig = field(default_factory=CacheConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    threads: int | None = None  # compute threads a rank; None: cores of the host / its ranks
    device: str = "auto"  # auto: CUDA where there is one; or cpu, cuda
    oversubscribe_gpus: bool = False  # workers may share a GPU

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        double = next((name for name in names if names.count(name) > 1), None)
        _check(double is None, f"two models are called {double}: give each a --served-model-name")
        _check(
            len(names) == 1 or self.model.chat_template is None,
            "--chat-template goes with one --model",
        )
        for name in (name for hosted in self.worker_models for name in hosted):
            _check(name in names, f"--worker-models {name}: there are {', '.join(names)}")

    @property
    def model(self) -> ModelConfig:
        """The first one."""
        return self.models[0]

    def hosted(self, worker: int) -> tuple[str, ...]:
        """Names of the models that worker 1, 2, 3 … hosts."""
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
class Options:
    """A command and its files; rank 0 alone needs them."""

    command: str  # "run-batch", "demo" or "pipe"
    config: Config
    input_file: str | None = None
    output_file: str | None = None
    request_rate: float | None = None  # requests a second; None: all at once
    replay: str | None = None  # a trace, in place of input_file
    rate_scale: float | None = None  # of a replay; None: as the trace has it
    length_scale: float | None = None
    max_requests: int | None = None
    report: str | None = None
    timeline: str | None = None
    show: int = 0  # answers to print
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
