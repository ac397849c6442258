# mypy: allow-untyped-defs
"""MELL's epoch: the moves after a batch of arrivals, growth and departures (paper, section VI.C).

The paper collects the moves of each operation in a buffer, prunes the buffer, then moves. Here the
rules look at the bins' contents only: a request that two operations would move out and back stays,
and one that would move twice goes to its last destination at once.
"""

import numba
import numpy as np

from mellmpi.scheduler.policies.mell.fill import fill, top_up
from mellmpi.scheduler.policies.mell.kernels import (
    ANY_FIT,
    EPSILON,
    GATHER,
    NEW_BIN,
    OVERFLOW,
    PAIR,
    L,
    M,
    S,
    bin_kind,
    build,
    bundles,
    is_incomplete,
    kind_of,
    move,
    target,
    tier,
)


@numba.njit(cache=True)
def epoch(items, bins, worst, operations):
    """Change `items.bin_of`, and set `items.unplaced`: the share of a bin to be opened.

    worst       the worst tier allowed, ANY_FIT or NEW_BIN
    operations  arrivals and departures since the last epoch
    """
    build(items, bins)
    for b in range(len(bins.load)):
        _relieve(items, bins, b, worst)
    _pair(items, bins, worst)
    for kind in (M, S):
        _gather(items, bins, kind, worst)
    fill(items, bins)
    for _ in range(operations):
        if not top_up(items, bins):
            return


@numba.njit(cache=True)
def feasible(items, bin_before, load):
    """bool [items]: moves whose destination has room now. The next epoch finds the others again.

    bin_before, load  int64 [items], float64 [bins]: before the epoch; load is overwritten
    """
    moved = np.flatnonzero(items.bin_of != bin_before)
    order = moved[np.argsort(items.bundle[moved], kind="mergesort")]
    found = np.zeros(len(bin_before), np.bool_)
    begin = 0
    while begin < len(order):
        end, total, dst = begin, 0.0, items.bin_of[order[begin]]
        while end < len(order) and items.bundle[order[end]] == items.bundle[order[begin]]:
            total += items.size[order[end]]
            end += 1
        if load[dst] + total <= 1 + EPSILON:
            load[dst] += total
            found[order[begin:end]] = True
        begin = end
    return found


# --- overload ------------------------------------------------------------------------------------


@numba.njit(cache=True)
def _relieve(items, bins, b, worst):
    """Move items out of an overfull bin: T's, or else an S or M, or else an L. (Update)"""
    while bins.load[b] > 1 + EPSILON and not _move_ts_out(items, bins, b, worst):
        if not _move_larger_out(items, bins, b, worst):
            items.unplaced[0] += bins.load[b] - 1
            return


@numba.njit(cache=True)
def _move_ts_out(items, bins, b, worst):
    """Move bundles of T's out until the rest fits; False if they have no destination.

    First the smallest sufficient bundle, or else the largest.
    """
    while bins.load[b] > 1 + EPSILON:
        members, bounds, sizes = bundles(items, bins, b)
        excess = bins.load[b] - 1
        dst = -1
        for _ in range(len(sizes)):
            p = _smallest_sufficient(sizes, excess)
            bundle = members[bounds[p] : bounds[p + 1]]
            dst = _overflow_target(items, bins, sizes[p], len(bundle), b, worst)
            if dst >= 0:
                move(items, bins, bundle, dst, OVERFLOW)
                break
            sizes[p] = -1.0
        if dst < 0:
            return False
    return True


@numba.njit(cache=True)
def _overflow_target(items, bins, size, slots, b, worst):
    """A bin with room now, or else one with room after its T's have moved out; -1: none."""
    dst = target(bins, size, slots, b, True, NEW_BIN)
    if dst < 0:
        dst = target(bins, size, slots, b, False, worst)
        # T's may move out too late, so a further bin is requested where it can be active in time.
        if dst < 0 or worst == NEW_BIN or _is_last_resort(bins, dst, size):
            items.unplaced[0] += size
    return dst


@numba.njit(cache=True)
def _is_last_resort(bins, b, size):
    return tier(bins.counts, bins.occupied[b], b, kind_of(size)) == ANY_FIT


@numba.njit(cache=True)
def _smallest_sufficient(sizes, enough):
    """Index of the smallest size >= `enough`, or else of the largest, or -1; ignores sizes < 0."""
    best = -1
    for p in range(len(sizes)):
        if sizes[p] < 0:
            continue
        if best < 0:
            best = p
        elif sizes[best] < enough:
            best = p if sizes[p] > sizes[best] else best
        elif enough <= sizes[p] < sizes[best]:
            best = p
    return best


@numba.njit(cache=True)
def _move_larger_out(items, bins, b, worst):
    """Move one S or M to another bin, or an L that is not alone; False if that is impossible."""
    excess = bins.load[b] - 1
    for kind in (S, M, L):
        if kind == L and bins.counts[L, b] < 2:
            return False
        best = -1
        i = items.head[b]
        while i >= 0:
            if items.kind[i] == kind and not items.pinned[i]:
                size = items.size[i]
                if best < 0 or (size >= excess and size < items.size[best]):
                    best = i
            i = items.next[i]
        if best >= 0:
            dst = _overflow_target(items, bins, items.size[best], 1, b, worst)
            if dst >= 0:
                _move_in(items, bins, best, dst, worst, OVERFLOW)
                return True
    return False


@numba.njit(cache=True)
def _move_in(items, bins, i, b, worst, rule):
    """Move item i to bin b, and T's out of b until all fits."""
    move(items, bins, np.array([i]), b, rule)
    _move_ts_out(items, bins, b, worst)


# --- S's and M's ---------------------------------------------------------------------------------


@numba.njit(cache=True)
def _fixed_load(bins, b):
    """Load of a bin without the T's that can move."""
    return bins.load[b] - bins.movable_t[b]


@numba.njit(cache=True)
def _pair(items, bins, worst):
    """Move to every L-bin without an S or M the largest that fits, from S- and M-bins.

    The fullest L-bin chooses first: this makes the most pairs.
    """
    unpaired, smallest = _unpaired(items, bins)
    if len(unpaired) == 0:
        return
    single = np.zeros(len(bins.load), np.bool_)
    for b in range(len(bins.load)):
        alone = bin_kind(bins.counts, b) == L and bins.counts[S, b] + bins.counts[M, b] == 0
        may = alone and bins.accepts[b] and bins.slots[b] > 0
        single[b] = may and _fixed_load(bins, b) + smallest <= 1 + EPSILON
    singles = np.flatnonzero(single)
    order = np.argsort(-(bins.load[singles] - bins.movable_t[singles]), kind="mergesort")
    for b in singles[order]:
        best = -1
        for k in range(len(unpaired)):
            i = unpaired[k]
            fits = i >= 0 and _fixed_load(bins, b) + items.size[i] <= 1 + EPSILON
            if fits and (best < 0 or items.size[i] > items.size[unpaired[best]]):
                best = k
        if best >= 0:
            _move_in(items, bins, unpaired[best], b, worst, PAIR)
            unpaired[best] = -1


@numba.njit(cache=True)
def _unpaired(items, bins):
    """(items, size of the smallest): S's and M's that can move, on bins without an L."""
    found, number, smallest = np.empty(len(items.size), np.int64), 0, 2.0
    for i in range(len(items.size)):
        if S <= items.kind[i] <= M and not items.pinned[i] and bins.counts[L, items.bin_of[i]] == 0:
            found[number] = i
            number += 1
            smallest = min(smallest, items.size[i])
    return found[:number], smallest


@numba.njit(cache=True)
def _gather(items, bins, kind, worst):
    """Move S's (M's) until at most one S-bin (M-bin) is incomplete: from the fewest to the most."""
    for _ in range(len(items.size)):
        givers = _incomplete_bins(items, bins, kind)
        if len(givers) < 2:
            return
        giver, dst = -1, -1
        for g in givers:
            size = items.size[_smallest_movable(items, g, kind)]
            giver, dst = g, _fullest_incomplete(bins, kind, g, size)
            if dst >= 0:
                break
        if dst < 0:  # each M is among S's that leave no room for another M
            giver = _first_with_s(bins, kind, givers)
            if giver < 0:
                return
            size = items.size[_smallest_movable(items, giver, kind)]
            dst = target(bins, size, 1, giver, False, NEW_BIN)
        if dst < 0:
            return
        _move_in(items, bins, _smallest_movable(items, giver, kind), dst, worst, GATHER)


@numba.njit(cache=True)
def _incomplete_bins(items, bins, kind):
    """Incomplete bins of this class with a movable item of it: fewest items first, then newest."""
    found = np.empty(len(bins.load), np.int64)
    number = 0
    for b in range(len(bins.load)):
        if is_incomplete(bins.counts, b, kind) and _smallest_movable(items, b, kind) >= 0:
            found[number] = b
            number += 1
    found = found[:number]
    found = found[np.argsort(-bins.activated[found], kind="mergesort")]
    return found[np.argsort(bins.counts[kind][found], kind="mergesort")]


@numba.njit(cache=True)
def _first_with_s(bins, kind, givers):
    """For M: the first of these bins that also holds an S; -1: none."""
    for b in givers:
        if kind == M and bins.counts[S, b] > 0:
            return b
    return -1


@numba.njit(cache=True)
def _smallest_movable(items, b, kind):
    """The smallest movable item of this class on the bin, or -1."""
    best, i = -1, items.head[b]
    while i >= 0:
        if items.kind[i] == kind and not items.pinned[i]:  # noqa: SIM102
            if best < 0 or items.size[i] < items.size[best]:
                best = i
        i = items.next[i]
    return best


@numba.njit(cache=True)
def _fullest_incomplete(bins, kind, giver, size):
    """The incomplete bin with most items of this class and room for one more without its T's.

    Of equals the oldest; -1: none.
    """
    best = -1
    for b in range(len(bins.load)):
        if b == giver or not is_incomplete(bins.counts, b, kind):
            continue
        if not bins.accepts[b] or bins.slots[b] < 1:
            continue
        if _fixed_load(bins, b) + size > 1 + EPSILON:
            continue
        key = -bins.counts[kind, b], bins.activated[b]
        if best < 0 or key < (-bins.counts[kind, best], bins.activated[best]):
            best = b
    return best
