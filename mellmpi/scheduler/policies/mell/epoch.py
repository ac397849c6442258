"""MELL's epoch: put right what arrivals, growth and departures have disturbed. (Section VI.C)

The paper keeps what each operation wants moved in a buffer, prunes it, and then moves. Here the
rules look at what the bins hold, however it came about: what an operation disturbed and another
one mended is not moved, and what moves twice within an epoch goes to its last place at once.
"""

import numba
import numpy as np

from mellmpi.scheduler.policies.mell.fill import fill, top_up
from mellmpi.scheduler.policies.mell.kernels import (
    EPSILON,
    GATHER,
    LAST,
    OPENED,
    OVERFLOW,
    PAIR,
    L,
    M,
    S,
    bears,
    fill_in,
    kind_of,
    lacks,
    move,
    pieces,
    target,
    tier,
)


@numba.njit(cache=True)
def epoch(items, bins, last, operations):  # type: ignore[no-untyped-def]
    """Edit `items.where`; `items.homeless` tells how much misses a bin to be opened for it.

    last        the worst tier that will do, LAST or OPENED
    operations  so many arrivals and departures there were since the last epoch
    """
    fill_in(items, bins)
    for b in range(len(bins.load)):
        _cure(items, bins, b, last)
    _pair(items, bins, last)
    for kind in (M, S):
        _gather(items, bins, kind, last)
    fill(items, bins)
    for _ in range(operations):
        if not top_up(items, bins):
            return


@numba.njit(cache=True)
def doable(items, where, load):  # type: ignore[no-untyped-def]
    """bool [items]: moves that find room now; the others are for the next epoch to find again.

    where, load  what they were before the epoch; load is written
    """
    moved = np.flatnonzero(items.where != where)
    order = moved[np.argsort(items.piece[moved], kind="mergesort")]
    found = np.zeros(len(where), np.bool_)
    begin = 0
    while begin < len(order):
        end, total, dst = begin, 0.0, items.where[order[begin]]
        while end < len(order) and items.piece[order[end]] == items.piece[order[begin]]:
            total += items.size[order[end]]
            end += 1
        if load[dst] + total <= 1 + EPSILON:
            load[dst] += total
            found[order[begin:end]] = True
        begin = end
    return found


# --- overload ------------------------------------------------------------------------------------


@numba.njit(cache=True)
def _cure(items, bins, b, last):  # type: ignore[no-untyped-def]
    """Re-allocate what is too much: T's, or else an S or M, or else an L."""
    while bins.load[b] > 1 + EPSILON and not _shed(items, bins, b, last):
        if not _expel(items, bins, b, last):
            items.homeless[0] += bins.load[b] - 1
            return


@numba.njit(cache=True)
def _shed(items, bins, b, last):  # type: ignore[no-untyped-def]
    """Re-allocate T's until the rest fits: the smallest piece that will do, or else the largest."""
    while bins.load[b] > 1 + EPSILON:
        members, bounds, sizes = pieces(items, bins, b)
        excess = bins.load[b] - 1
        dst = -1
        for _ in range(len(sizes)):
            p = _of_size(sizes, excess)
            piece = members[bounds[p] : bounds[p + 1]]
            dst = _refuge(items, bins, sizes[p], len(piece), b, last)
            if dst >= 0:
                move(items, bins, piece, dst, OVERFLOW)
                break
            sizes[p] = -1.0
        if dst < 0:
            return False
    return True


@numba.njit(cache=True)
def _refuge(items, bins, size, seats, b, last):  # type: ignore[no-untyped-def]
    """A bin for what overflows: where there is room at once, or else once T's have left, or -1."""
    dst = target(bins, size, seats, b, True, OPENED)
    if dst < 0:
        dst = target(bins, size, seats, b, False, last)
        # T's that make room first may be too late: an empty bin that comes at once is safer.
        if dst < 0 or last == OPENED or _unwanted(bins, dst, size):
            items.homeless[0] += size
    return dst


@numba.njit(cache=True)
def _unwanted(bins, b, size):  # type: ignore[no-untyped-def]
    return tier(bins.num, bins.held[b], b, kind_of(size)) == LAST


@numba.njit(cache=True)
def _of_size(sizes, enough):  # type: ignore[no-untyped-def]
    """The smallest that is enough, or else the largest; under zero: not any more."""
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
def _expel(items, bins, b, last):  # type: ignore[no-untyped-def]
    """One S or M leaves for another bin, whose T's make room for it; or an L that is not alone."""
    excess = bins.load[b] - 1
    for kind in (S, M, L):
        if kind == L and bins.num[L, b] < 2:
            return False
        best = -1
        i = items.first[b]
        while i >= 0:
            if items.kind[i] == kind and not items.pinned[i]:
                size = items.size[i]
                if best < 0 or (size >= excess and size < items.size[best]):
                    best = i
            i = items.after[i]
        if best >= 0:
            dst = _refuge(items, bins, items.size[best], 1, b, last)
            if dst >= 0:
                _enter(items, bins, best, dst, last, OVERFLOW)
                return True
    return False


@numba.njit(cache=True)
def _enter(items, bins, i, b, last, why):  # type: ignore[no-untyped-def]
    """An S or M goes there, and T's make room for it."""
    move(items, bins, np.array([i]), b, why)
    _shed(items, bins, b, last)


# --- S's and M's ---------------------------------------------------------------------------------


@numba.njit(cache=True)
def _firm(bins, b):  # type: ignore[no-untyped-def]
    return bins.load[b] - bins.soft[b]


@numba.njit(cache=True)
def _pair(items, bins, last):  # type: ignore[no-untyped-def]
    """Every L-GPU without an S or M gets the largest that fits, of those on S/M-GPUs.

    The fullest L-GPU chooses first: that pairs as many as can be paired.
    """
    loose, smallest = _loose(items, bins)
    if len(loose) == 0:
        return
    single = np.zeros(len(bins.load), np.bool_)
    for b in range(len(bins.load)):
        lacks = bears(bins.num, b) == L and bins.num[S, b] + bins.num[M, b] == 0
        may = lacks and bins.usable[b] and bins.seats[b] > 0
        single[b] = may and _firm(bins, b) + smallest <= 1 + EPSILON
    singles = np.flatnonzero(single)
    order = np.argsort(-(bins.load[singles] - bins.soft[singles]), kind="mergesort")
    for b in singles[order]:
        best = -1
        for k in range(len(loose)):
            i = loose[k]
            fits = i >= 0 and _firm(bins, b) + items.size[i] <= 1 + EPSILON
            if fits and (best < 0 or items.size[i] > items.size[loose[best]]):
                best = k
        if best >= 0:
            _enter(items, bins, loose[best], b, last, PAIR)
            loose[best] = -1


@numba.njit(cache=True)
def _loose(items, bins):  # type: ignore[no-untyped-def]
    """The S's and M's on S/M-GPUs that can move, and the size of the smallest."""
    loose, number, smallest = np.empty(len(items.size), np.int64), 0, 2.0
    for i in range(len(items.size)):
        if S <= items.kind[i] <= M and not items.pinned[i] and bins.num[L, items.where[i]] == 0:
            loose[number] = i
            number += 1
            smallest = min(smallest, items.size[i])
    return loose[:number], smallest


@numba.njit(cache=True)
def _gather(items, bins, kind, last):  # type: ignore[no-untyped-def]
    """All S-GPUs (M-GPUs) but one are whole: who has least of them gives to who has most."""
    for _ in range(len(items.size)):
        givers = _lacking(items, bins, kind)
        if len(givers) < 2:
            return
        giver, taker = -1, -1
        for g in givers:
            giver, taker = g, _taker(bins, kind, g, items.size[_movable(items, g, kind)])
            if taker >= 0:
                break
        if taker < 0:  # M's among S's, which leave no room for another M
            giver = _mixed(bins, kind, givers)
            if giver < 0:
                return
            taker = target(bins, items.size[_movable(items, giver, kind)], 1, giver, False, OPENED)
        if taker < 0:
            return
        _enter(items, bins, _movable(items, giver, kind), taker, last, GATHER)


@numba.njit(cache=True)
def _lacking(items, bins, kind):  # type: ignore[no-untyped-def]
    """The bins that lack some and can give: who has least of them first, then the newest."""
    some = np.empty(len(bins.load), np.int64)
    number = 0
    for b in range(len(bins.load)):
        if lacks(bins.num, b, kind) and _movable(items, b, kind) >= 0:
            some[number] = b
            number += 1
    some = some[:number]
    some = some[np.argsort(-bins.age[some], kind="mergesort")]
    return some[np.argsort(bins.num[kind][some], kind="mergesort")]


@numba.njit(cache=True)
def _mixed(bins, kind, givers):  # type: ignore[no-untyped-def]
    """One where S's would stay if its M left; -1 if there is none."""
    for b in givers:
        if kind == M and bins.num[S, b] > 0:
            return b
    return -1


@numba.njit(cache=True)
def _movable(items, b, kind):  # type: ignore[no-untyped-def]
    """The smallest of this class that can leave, or -1."""
    best, i = -1, items.first[b]
    while i >= 0:
        if items.kind[i] == kind and not items.pinned[i]:  # noqa: SIM102
            if best < 0 or items.size[i] < items.size[best]:
                best = i
        i = items.after[i]
    return best


@numba.njit(cache=True)
def _taker(bins, kind, giver, size):  # type: ignore[no-untyped-def]
    """The bin that lacks some and has most of them, where it fits once the T's have left."""
    best = -1
    for b in range(len(bins.load)):
        if b == giver or not lacks(bins.num, b, kind) or not bins.usable[b] or bins.seats[b] < 1:
            continue
        if _firm(bins, b) + size > 1 + EPSILON:
            continue
        if best < 0 or (-bins.num[kind, b], bins.age[b]) < (-bins.num[kind, best], bins.age[best]):
            best = b
    return best
