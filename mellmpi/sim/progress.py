"""The cluster scheduler of a simulation: tokens are counted, and all workers report at once.

Whoever ends or is preempted is reported as ever; what the others have decoded meanwhile is a few
columns. The decisions are those of ClusterScheduler, from the same view.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from mellmpi.scheduler import ClusterScheduler, Commands, Log, RequestColumns

STOP = 1  # the token that ends an answer; all others are 0


@lru_cache(maxsize=4096)
def zeros(n: int) -> tuple[int, ...]:
    """Shared, so that a thousand prompts of one length cost one."""
    return (0,) * n


@dataclass(slots=True)
class CountedLog:
    """As many tokens as its row of the view says: nobody reads them."""

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
        """The part of a run that is new; the row is told at once."""
        assert first <= self._length, f"gap: have {self._length}, run starts at {first}"
        new = tokens[self._length - first :]
        self.ended = self.ended or STOP in new[-1:]
        self.columns.num_tokens[self.row] += len(new)
        return new


@dataclass(frozen=True, slots=True)
class Progress:
    """What several workers have decoded since they last said so. Nothing else has happened."""

    workers: np.ndarray  # int64 [workers], ids; only of those that have an arena
    free_bytes: np.ndarray  # int64 [workers]
    acked: list[int]  # commands handled, by worker in the order of `workers`
    decoded: np.ndarray  # int64 [workers + 1], tokens, by worker id
    rows: np.ndarray  # int64 [requests]: rows of the view
    outputs: np.ndarray  # int64 [requests]: tokens that each has by now


class CountingScheduler(ClusterScheduler):
    """Rank 0 on simulated workers."""

    def log_for(self, row: int) -> Log:
        return CountedLog(self.registry.view.requests, row)

    def _count(self, rows: list[int], added: list[int]) -> None:
        """The log has done that."""

    def advance(self, progress: Progress, now: float) -> Commands:
        """As `handle` of one report a worker. Nobody resumes by it: room has only shrunk."""
        view, ledger = self.registry.view, self.registry.ledger
        view.now = now
        ledger.report_all(progress.workers, progress.acked, progress.free_bytes)
        self.registry.rates.decoded += progress.decoded
        requests = view.requests
        requests.num_tokens[progress.rows] = requests.num_prompt[progress.rows] + progress.outputs
        self.placement.place_waiting()
        return self.registry.take()
