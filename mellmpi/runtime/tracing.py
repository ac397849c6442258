"""The file of `--trace-out`, written while the job runs."""

from collections.abc import Callable

from mellmpi.files import Destination, Unwritable
from mellmpi.telemetry import Metrics, Observer, Observers, Trace


class Tracing:
    """A trace, or none. A file that cannot be written ends the trace, not the run."""

    def __init__(self, file: Destination | None):
        self._file, self._problems = file, list[str]()
        self._trace: Trace | None = None
        if file is not None:
            self._try(file.begin)
            self._trace = Trace(lambda data: self._try(lambda: file.append(data)))

    def beside(self, metrics: Metrics) -> Observer:
        """The observer of the run."""
        return metrics if self._trace is None else Observers(metrics, self._trace)

    def close(self, now: float) -> list[str]:
        """Complete the file. Returns why it is not complete, if so."""
        if self._trace is not None and self._file is not None:
            self._trace.close(now)
            self._try(self._file.flush)
        return self._problems

    def _try(self, write: Callable[[], None]) -> None:
        """Write, unless writing has failed before."""
        if self._problems:
            return
        try:
            write()
        except Unwritable as error:
            self._problems.append(str(error))
