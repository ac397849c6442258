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
    replay: str | None = None  # a trace, in place of input_file
    rate_scale: float | None = None  # of a replay; None: as the trace has it
    length_scale: float | None = None
    max_requests: int | None = None
    report: str | None = None
    timeline: str | None = None
    show: int = 0  # answers to print
    cache_dir: str | None = None  # None: the user's cache directory

    def __post_init__(self) -> None:
        scales = {"--rate-scale": self.rate_scale, "--length-scale": self.length_scale,
                  "--max-requests": self.max_requests}  # fmt: skip
        given = [flag for flag, value in scales.items() if value is not None]
        if self.replay is None and given:
            raise ValueError(f"{given[0]} goes with --replay TRACE")
        if self.replay is not None:
            self._check_replay()

    def _check_replay(self) -> None:
        if self.input_file is not None:
            raise ValueError("requests come from -i FILE or from --replay TRACE: leave one out")
        if self.request_rate is not None:
            raise ValueError("a replay has the arrivals of its trace; in place of --request-rate, "
                             "--rate-scale X makes them X times as fast")  # fmt: skip
