"""Options of the command `simulate`, checked."""

from dataclasses import dataclass
from pathlib import Path

from mellmpi.costs import CostModel
from mellmpi.files import visible
from mellmpi.scheduler.policies import POLICIES
from mellmpi.sim.profiles import MODELS, PROFILES, cost_from, cost_of

PICTURES = (".png", ".pdf", ".svg", ".jpg")


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """Trace, cluster, policies and outputs of a simulation. ValueError names the flag to change."""

    trace: str = ""
    rate_scale: float = 1.0
    model: dict[str, str] | None = None  # known models, by their names in the trace; "": all
    kv_bytes_per_token: dict[str, int] | None = None  # likewise
    hosts: list[tuple[str, ...]] | None = None  # models of GPU 1, 2, …, repeated as needed
    gpu_kv_gib: float = 0.0
    policies: str = ",".join(POLICIES)
    ideal: bool = False
    decode_rate: float = 30.0  # tokens/s of every request, if ideal
    profile: str = "A100-40G"  # GPU of the cost model, if not ideal
    cost_from: str | None = None  # report of a run to fit the cost model to, instead of `profile`
    tick_s: float = 0.25
    gpus: int | None = None  # None: as many as any policy asks for
    thrift: float = 0.5
    seed: int = 0
    json: str | None = None
    plot: str | None = None
    frontier: bool = False

    def __post_init__(self) -> None:
        if not self.trace:
            raise ValueError("simulate needs --trace FILE")
        self._check_models()
        if not self.gpu_kv_gib:
            raise ValueError("simulate needs --gpu-kv-gib G")
        self._check_hosts()
        self._check_picture()
        if unknown := [name for name in self.names if name not in POLICIES]:
            raise ValueError(
                f"--policies: {', '.join(unknown)} is not one of {', '.join(POLICIES)}"
            )
        if self.profile not in PROFILES:
            raise ValueError(f"--profile must be one of {', '.join(PROFILES)}, not {self.profile}")
        if not (self.ideal or self.model or self.cost_from):
            raise ValueError(
                "what steps take depends on the model: give a known one by --model, "
                "or --cost-from REPORT, or add --ideal"
            )

    def _check_models(self) -> None:
        if (self.model is None) == (self.kv_bytes_per_token is None):
            raise ValueError("simulate needs one of --model and --kv-bytes-per-token")
        for model in (self.model or {}).values():
            if model not in MODELS:
                raise ValueError(
                    f"--model must be one of {', '.join(MODELS)}, not {model}; "
                    "give others by --kv-bytes-per-token"
                )

    def _check_picture(self) -> None:
        if self.plot is not None and Path(self.plot).suffix.lower() not in PICTURES:
            raise ValueError(
                f"--plot {visible(self.plot)}: its name must end with the kind of "
                f"picture, one of {' '.join(PICTURES)}"
            )

    def _check_hosts(self) -> None:
        hosted = {model for models in self.hosts or [] for model in models}
        if self.hosts is None:
            return
        if unknown := sorted(hosted - self.token_bytes.keys()):
            raise ValueError(f"--hosts: {unknown[0]!r} is none of {', '.join(self.token_bytes)}")
        if missing := sorted(self.token_bytes.keys() - hosted):
            raise ValueError(f"--hosts: no GPU hosts {missing[0]!r}")
        if self.gpus is not None and self.gpus < len(self.hosts):
            raise ValueError(f"--hosts names {len(self.hosts)} GPUs, but --gpus is {self.gpus}")

    @property
    def names(self) -> list[str]:
        """Names of the policies."""
        return [name.strip() for name in self.policies.split(",")]

    @property
    def token_bytes(self) -> dict[str, int]:
        """KV bytes of one position, by model."""
        if self.kv_bytes_per_token is not None:
            return self.kv_bytes_per_token
        return {name: MODELS[model].token_bytes for name, model in (self.model or {}).items()}

    def cost(self, context_bytes: float) -> CostModel:
        """Return the cost model, if not ideal; of several models, that of the largest."""
        if self.cost_from is not None:
            return cost_from(self.cost_from)
        shapes = [MODELS[model] for model in (self.model or {}).values()]
        largest = max(shapes, key=lambda shape: shape.parameters)
        return cost_of(PROFILES[self.profile], largest, context_bytes)
