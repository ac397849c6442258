"""MELL's T's: they fill what S's, M's and L's leave, and T-GPUs get as few as can be."""

import numba
import numpy as np

from mellmpi.scheduler.policies.mell.kernels import (
    EMPTY,
    EPSILON,
    FILL,
    FULL_ENOUGH,
    ROOM_TO_GROW,
    M,
    S,
    T,
    bears,
    lacks,
    move,
    pieces,
)


@numba.njit(cache=True)
def fill(items, bins):  # type: ignore[no-untyped-def]
    """While there is a T-GPU that can give, no other T-, M- or L-GPU stays under 75 %.

    But for those that lack S's or M's, a few: who arrives fills them.
    """
    giver = _emptiest(bins)
    for b in range(len(bins.load)):
        while giver >= 0 and b != giver and _wants_more(bins, b):
            if not _pull(items, bins, giver, b):
                break
            if bears(bins.num, giver) == EMPTY:
                giver = _emptiest(bins)


@numba.njit(cache=True)
def _wants_more(bins, b):  # type: ignore[no-untyped-def]
    kind = bears(bins.num, b)
    rests = kind == EMPTY or (kind in (S, M) and lacks(bins.num, b, kind))
    return bins.usable[b] and bins.load[b] < FULL_ENOUGH and not rests


@numba.njit(cache=True)
def _emptiest(bins):  # type: ignore[no-untyped-def]
    """The T-GPU with most room, whose T's can leave; then the newest."""
    best = -1
    for b in range(len(bins.load)):
        if bears(bins.num, b) != T or bins.soft[b] <= 0:
            continue
        if best < 0 or (bins.load[b], -bins.age[b]) < (bins.load[best], -bins.age[best]):
            best = b
    return best


@numba.njit(cache=True)
def _pull(items, bins, giver, b):  # type: ignore[no-untyped-def]
    """The largest piece of the giver that fits goes there."""
    members, bounds, sizes = pieces(items, bins, giver)
    best = -1
    for p in range(len(sizes)):
        fits = bins.load[b] + sizes[p] <= 1 + EPSILON
        if fits and bins.seats[b] >= bounds[p + 1] - bounds[p]:  # noqa: SIM102
            if best < 0 or sizes[p] > sizes[best]:
                best = p
    if best < 0:
        return False
    move(items, bins, members[bounds[best] : bounds[best + 1]], b, FILL)
    return True


@numba.njit(cache=True)
def top_up(items, bins):  # type: ignore[no-untyped-def]
    """The largest piece of the emptiest T-GPU for which another has room goes where it is tightest.

    The paper's Depart pulls a fitting T for every T that leaves, also from a GPU over 75 %.
    """
    giver = _emptiest(bins)
    if giver < 0:
        return False
    members, bounds, sizes = pieces(items, bins, giver)
    for p in np.argsort(-sizes, kind="mergesort"):
        dst = _tightest(bins, giver, sizes[p], bounds[p + 1] - bounds[p])
        if dst >= 0:
            move(items, bins, members[bounds[p] : bounds[p + 1]], dst, FILL)
            return True
    return False


@numba.njit(cache=True)
def _tightest(bins, giver, size, seats):  # type: ignore[no-untyped-def]
    """The fullest bin in use that takes so much at once and keeps room to grow, or -1."""
    best = -1
    for b in range(len(bins.load)):
        if b == giver or not bins.usable[b] or bins.seats[b] < seats:
            continue
        if bears(bins.num, b) == EMPTY or bins.now[b] + size > 1 - ROOM_TO_GROW:
            continue
        if best < 0 or bins.load[b] > bins.load[best]:
            best = b
    return best
