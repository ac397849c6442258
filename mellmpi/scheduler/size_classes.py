"""Number of requests of each size class on each worker, updated with every change of owner.

For policies that place by size class without a scan of all requests. Sizes are as of the last
`recount`, which a policy calls once a round.
"""

from bisect import bisect_left

import numpy as np

from mellmpi.scheduler.ledger import Ledger


class SizeClassCounts:
    """Class k ≥ 1 holds KV sizes in (bounds[k - 2], bounds[k - 1]], as shares of the capacity.

    The first class has no lower bound, the last one no upper bound; class 0 stays empty.
    """

    def __init__(self, bounds: tuple[float, ...], num_workers: int):
        self.bounds = bounds
        self.kind = np.zeros(64, np.int64)  # [request rows]: class; 0: on no worker
        self.operations = 0  # requests that got or lost an owner since the last recount
        self.num = np.zeros((len(bounds) + 2, num_workers + 1), np.int64)  # [classes, workers]

    def recount(self, rows: np.ndarray, kinds: np.ndarray, workers: np.ndarray) -> None:
        """Count anew: rows[i] has class kinds[i] and is on workers[i]; others are on no worker."""
        self._grow(int(rows.max(initial=0)))
        self.kind[:] = 0
        self.kind[rows] = kinds
        size = self.num.shape[1]
        counted = np.bincount(kinds * size + workers, minlength=self.num.size)
        self.operations = 0
        self.num[:] = counted.reshape(self.num.shape)

    def enter(self, row: int, num_bytes: int, before: int, after: int, workers: Ledger) -> None:
        """Update the counts for a request that changes its owner; worker 0 means no owner."""
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
