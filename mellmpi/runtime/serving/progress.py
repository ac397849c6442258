"""Whether the workers make progress: what `/ready` answers by."""

from typing import Any

from mellmpi.protocol import Address, StepReport

STALLED_S = 30.0  # without a report of any step, though requests run


class Progress:
    """Observes events like `Metrics`. Pure: time is an argument."""

    def __init__(self) -> None:
        self._since_s: float | None = None  # last step, or when requests began to run without one

    def observe(self, now: float, source: Address, event: Any) -> None:
        """Rank 0 has received `event`."""
        if isinstance(event, StepReport) and event.steps:
            self._since_s = now

    def commands(self, now: float, commands: list[tuple[Address, Any]]) -> None:
        """Do nothing: commands are not progress."""

    def problem(self, now: float, num_running: int) -> str:
        """Return why requests make no progress, or ""."""
        if not num_running:
            self._since_s = None
            return ""
        if self._since_s is None:
            self._since_s = now
        silent_s = now - self._since_s
        if silent_s < STALLED_S:
            return ""
        return f"no worker has computed a step for {silent_s:.0f} s; {num_running} requests run"
