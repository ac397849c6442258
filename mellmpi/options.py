"""What one command was told to do, beside the Config that all ranks share."""

from dataclasses import dataclass

from mellmpi.config import Config


@dataclass(frozen=True, kw_only=True)
class Options:
    """A command and its files; rank 0 alone needs them."""

    command: str  # "run-batch", "demo" or "pipe"
    config: Config
    input_file: str | None = None
    output_file: str | None = None
    request_rate: float | None = None  # requests a second; None: all at once
    report: str | None = None
    timeline: str | None = None
    show: int = 0  # answers to print
    cache_dir: str | None = None  # None: the user's cache directory

    def __post_init__(self) -> None:
        if self.request_rate is not None and not self.request_rate > 0:
            raise ValueError(f"--request-rate must be over 0, not {self.request_rate}")
