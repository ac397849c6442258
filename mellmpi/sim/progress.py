"""The cluster scheduler of a simulation: it counts tokens, and all workers report at once.

Ends and preemptions are reported as usual; the decode progress of all other requests is a few
columns. Decisions are those of ClusterScheduler, on the same view.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from mellmpi.scheduler import ClusterScheduler, Commands, Log, RequestColumns

STOP = 1  # the token that ends an answer; all others are 0


@lru_cache(maxsize=4096)
def zeros(n: int) -> tuple[int, ...]:
    """Return `n` zeros. The tuple is shared by all prompts of one length."""
    return (0,) * n


@dataclass(slots=True)
class CountedLog:
    """A token log that stores only a length: that of its row of the view."""

    columns: RequestColumns
    row: int
    ended: bool = field(default=False)

    @property
    def _length(self) -> int:
        return int(self.columns.num_tokens[self.row] - self.columns.num_prompt[self.row])

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*zeros(self._length - 1), STOP) if self.ended else zeros(self._length)

    def merge(self, first: int, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Add a run of tokens to the row. Returns the new part of the run."""
        assert first <= self._length, f"gap: have {self._length}, run starts at {first}"
        new = tokens[self._length - first :]
        self.ended = self.ended or STOP in new[-1:]
        self.columns.num_tokens[self.row] += len(new)
        return new


@dataclass(frozen=True, slots=True)
class Progress:
    """Decode progress of several workers since their last report, with no other events."""

    workers: np.ndarray  # int64 [workers], ids of those that have an arena
    free_bytes: np.ndarray  # int64 [workers]
    acked: list[int]  # commands handled, in the order of `workers`
    decoded: np.ndarray  # int64 [workers + 1], tokens, by worker id
    rows: np.ndarray  # int64 [requests]: rows of the view
    outputs: np.ndarray  # int64 [requests]: output tokens so far


class CountingScheduler(ClusterScheduler):
    """The cluster scheduler of simulated workers."""

    def log_for(self, row: int) -> Log:
        return CountedLog(self.registry.view.requests, row)

    def _count(self, rows: list[int], added: list[int]) -> None:
        """Does nothing: `CountedLog` updates the row."""

    def advance(self, progress: Progress, now: float) -> Commands:
        """Like `handle` of one report per worker. No request resumes: free room has only shrunk."""
        view, ledger = self.registry.view, self.registry.ledger
        view.now = now
        ledger.report_all(progress.workers, progress.acked, progress.free_bytes)
        self.registry.rates.decoded += progress.decoded
        requests = view.requests
        requests.num_tokens[progress.rows] = requests.num_prompt[progress.rows] + progress.outputs
        self._place()
        return self.registry.take()
