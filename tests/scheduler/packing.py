"""MELL as a bin packing algorithm on items of given sizes, for tests of its bounds."""

import numpy as np

from mellmpi.scheduler.policies.mell.epoch import epoch
from mellmpi.scheduler.policies.mell.kernels import NEW_BIN, Bins, build, target
from mellmpi.scheduler.policies.mell.policy import items_of

SPARE = 4  # empty bins offered to every operation
MANY = 1 << 30


def bins_of(ages, base=None):
    """Bins without items; `base`: share of each bin that is filled by something else."""
    n = len(ages)
    load = np.zeros(n) if base is None else np.array(base, float)
    return Bins(
        load=load,
        movable_t=np.zeros(n),
        counts=np.zeros((5, n), np.int64),
        activated=np.array(ages, np.int64),
        slots=np.full(n, MANY),
        accepts=np.ones(n, bool),
        occupied=load > 0,
        load_now=load.copy(),
    )


class Packing:
    """An unlimited number of bins. `moves`: number in each epoch; a bundle counts as one move."""

    def __init__(self):
        self.size: dict[int, float] = {}
        self.where: dict[int, int] = {}
        self.age: dict[int, int] = {}  # of the bins in use
        self.newest = 0
        self.total = 0  # items that ever arrived
        self.operations = 0  # arrivals and departures since the last epoch
        self.moves: list[int] = []

    def bins(self):
        """The sizes of the items in each bin in use."""
        held: dict[int, list[float]] = {}
        for item, b in self.where.items():
            held.setdefault(b, []).append(self.size[item])
        return list(held.values())

    def arrive(self, item, size):
        b = int(target(self._filled(), size, 1, -1, True, NEW_BIN))
        assert b >= 0
        self.total += 1
        self.operations += 1
        self.size[item] = size
        self._put(item, b)

    def depart(self, item):
        self.operations += 1
        del self.size[item], self.where[item]

    def grow(self, item, size):
        self.size[item] = size

    def epoch(self):
        """Make the moves of one epoch; return their number, a bundle to one bin counted as one."""
        ids, (items, bins) = list(self.size), self._arrays()
        before = items.bin_of.copy()
        epoch(items, bins, NEW_BIN, self.operations)
        self.operations = 0
        moved = [i for i in range(len(ids)) if items.bin_of[i] != before[i]]
        made = {(int(items.bundle[i]), int(before[i]), int(items.bin_of[i])) for i in moved}
        for i in moved:
            self._put(ids[i], int(items.bin_of[i]))
        self.moves.append(len(made))
        return len(made)

    def _put(self, item, b):
        if b not in self.where.values():
            self.newest += 1
            self.age[b] = self.newest
        self.where[item] = b

    def _arrays(self):
        num = max([*self.where.values(), -1]) + 1 + SPARE
        bins = bins_of([self.age.get(b, 0) for b in range(num)])
        bins.occupied[list(set(self.where.values()))] = True
        ids = list(self.size)
        size, where = np.array([self.size[i] for i in ids]), [self.where[i] for i in ids]
        return items_of(size, np.array(where, np.int64), np.zeros(len(ids), bool), num), bins

    def _filled(self):
        items, bins = self._arrays()
        build(items, bins)
        return bins
