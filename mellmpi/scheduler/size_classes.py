"""How many requests of which size each worker has: kept up with every placement and departure.

For policies that place by class of size, and cannot look at every request for every placement.
Sizes are as of the last `recount`; a policy does that once a round.
"""

from bisect import bisect_left

import numpy as np

from mellmpi.scheduler.ledger import Ledger


class SizeClassCounts:
    """Class k holds sizes in (bounds[k - 1], bounds[k]] of the worker's capacity; 0 is nobody."""

    def __init__(self, bounds: tuple[float, ...], num_workers: int):
        self.bounds = bounds
        self.kind = np.zeros(64, np.int64)  # [request rows]; 0: on no worker
        self.operations = 0  # arrivals and departures since the last recount
        self.num = np.zeros((len(bounds) + 2, num_workers + 1), np.int64)  # [classes, workers]

    def recount(self, rows: np.ndarray, kinds: np.ndarray, workers: np.ndarray) -> None:
        """These rows, of these classes, are on these workers, and no others on any."""
        self._grow(int(rows.max(initial=0)))
        self.kind[:] = 0
        self.kind[rows] = kinds
        size = self.num.shape[1]
        counted = np.bincount(kinds * size + workers, minlength=self.num.size)
        self.operations = 0
        self.num[:] = counted.reshape(self.num.shape)

    def enter(self, row: int, num_bytes: int, before: int, after: int, workers: Ledger) -> None:
        """The request has come from the one worker (0: from none) to the other (0: to none)."""
        self._grow(row)
        self.operations += not before or not after
        if before and self.kind[row]:
            self.num[self.kind[row], before] -= 1
        if not after:
            self.kind[row] = 0
            return
        if not before or not self.kind[row]:
            self.kind[row] = 1 + bisect_left(self.bounds, num_bytes / workers.capacity[after])
        self.num[self.kind[row], after] += 1

    def _grow(self, row: int) -> None:
        while row >= len(self.kind):
            self.kind = np.concatenate([self.kind, np.zeros_like(self.kind)])
