# mypy: allow-untyped-defs
"""MELL's T's: they fill what S's, M's and L's leave, so that few T-bins remain."""

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
    bin_kind,
    bundles,
    is_incomplete,
    move,
)


@numba.njit(cache=True)
def fill(items, bins):
    """Move T's from the emptiest T-bins to other bins under 75 %, while there are any.

    Incomplete S- and M-bins are left to arrivals.
    """
    giver = _emptiest_t_bin(bins)
    for b in range(len(bins.load)):
        while giver >= 0 and b != giver and _is_underfull(bins, b):
            if not _pull(items, bins, giver, b):
                break
            if bin_kind(bins.counts, giver) == EMPTY:
                giver = _emptiest_t_bin(bins)


@numba.njit(cache=True)
def _is_underfull(bins, b):
    kind = bin_kind(bins.counts, b)
    skipped = kind == EMPTY or (kind in (S, M) and is_incomplete(bins.counts, b, kind))
    return bins.accepts[b] and bins.load[b] < FULL_ENOUGH and not skipped


@numba.njit(cache=True)
def _emptiest_t_bin(bins):
    """The T-bin with the lowest load and a movable T; of equals the newest; -1: none."""
    best = -1
    for b in range(len(bins.load)):
        if bin_kind(bins.counts, b) != T or bins.movable_t[b] <= 0:
            continue
        key = bins.load[b], -bins.activated[b]
        if best < 0 or key < (bins.load[best], -bins.activated[best]):
            best = b
    return best


@numba.njit(cache=True)
def _pull(items, bins, giver, b):
    """Move the largest bundle that fits from `giver` to `b`; False if none fits."""
    members, bounds, sizes = bundles(items, bins, giver)
    best = -1
    for p in range(len(sizes)):
        fits = bins.load[b] + sizes[p] <= 1 + EPSILON
        if fits and bins.slots[b] >= bounds[p + 1] - bounds[p]:  # noqa: SIM102
            if best < 0 or sizes[p] > sizes[best]:
                best = p
    if best < 0:
        return False
    move(items, bins, members[bounds[best] : bounds[best + 1]], b, FILL)
    return True


@numba.njit(cache=True)
def top_up(items, bins):
    """Move the largest bundle that fits somewhere from the emptiest T-bin to the fullest bin.

    False if there is none. The paper's Depart moves a fitting T in for every T that departs, also
    to a GPU over 75 %.
    """
    giver = _emptiest_t_bin(bins)
    if giver < 0:
        return False
    members, bounds, sizes = bundles(items, bins, giver)
    for p in np.argsort(-sizes, kind="mergesort"):
        dst = _fullest(bins, giver, sizes[p], bounds[p + 1] - bounds[p])
        if dst >= 0:
            move(items, bins, members[bounds[p] : bounds[p + 1]], dst, FILL)
            return True
    return False


@numba.njit(cache=True)
def _fullest(bins, giver, size, slots):
    """The fullest bin in use with room now for the size and for growth; -1: none."""
    best = -1
    for b in range(len(bins.load)):
        if b == giver or not bins.accepts[b] or bins.slots[b] < slots:
            continue
        if bin_kind(bins.counts, b) == EMPTY or bins.load_now[b] + size > 1 - ROOM_TO_GROW:
            continue
        if best < 0 or bins.load[b] > bins.load[best]:
            best = b
    return best
