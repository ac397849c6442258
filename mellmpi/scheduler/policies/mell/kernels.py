# mypy: allow-untyped-defs
"""Data and primitives of MELL's rules: bins and items, size classes, bundles, and Allocate.

Workers are bins, requests are items; sizes and loads are shares of a bin. Size classes: T up to
1/4, S up to 1/3, M up to 1/2, L above. A bin has the class of its largest item (an L-bin is the
paper's L-GPU). T's of at most 1/8 move in bundles of (1/8, 1/4], the paper's multi-items; bundles
are formed at each move, so a member that grows, ends or leaves needs no bookkeeping.

Compiled with numba; plain Python with NUMBA_DISABLE_JIT=1.
"""

from typing import NamedTuple

import numba
import numpy as np

from mellmpi.scheduler.policies.kernels import can_be_activated

EMPTY, T, S, M, L = 0, 1, 2, 3, 4
FULL_ENOUGH = 0.75
TINY = 1 / 8
ROOM_TO_GROW = 0.05
EPSILON = 1e-9  # rounding error of sums of shares
# Tiers of Allocate, best first. ANY_FIT: it fits, but no rule of the paper allows it.
PARTNER, FILLING, OWN, NEW_BIN, ANY_FIT, NO_TIER = 0, 1, 2, 3, 4, 5
OVERFLOW, PAIR, GATHER, FILL = 0, 1, 2, 3  # rules that move items: index of REASONS
REASONS = "overflow", "pair", "gather", "fill"


class Bins(NamedTuple):
    """Workers of one capacity."""

    load: np.ndarray  # float64 [bins]: share in use, including incoming items
    movable_t: np.ndarray  # float64 [bins]: share of the T's that can move
    counts: np.ndarray  # int64 [classes, bins]: items of each class
    activated: np.ndarray  # int64 [bins]: order of activation, the newest is highest
    slots: np.ndarray  # int64 [bins]: items that can still be added
    accepts: np.ndarray  # bool [bins]: may be a destination
    occupied: np.ndarray  # bool [bins]: holds or awaits items
    load_now: np.ndarray  # float64 [bins]: load, still with the items that this epoch moves out


class Items(NamedTuple):
    """Requests on bins; the items of a bin are a doubly linked list."""

    size: np.ndarray  # float64 [items]: share of a bin
    kind: np.ndarray  # int64 [items]: size class
    bin_of: np.ndarray  # int64 [items]
    pinned: np.ndarray  # bool [items]: cannot move
    bundle: np.ndarray  # int64 [items]: number of the last move, common to its members; 0: none
    next: np.ndarray  # int64 [items]: next item of the same bin, or -1
    prev: np.ndarray  # int64 [items]: previous item of the same bin, or -1
    head: np.ndarray  # int64 [bins]: first item, or -1
    rule: np.ndarray  # int64 [items]: rule of the last move
    num_moves: np.ndarray  # int64 [1]: bundles moved
    unplaced: np.ndarray  # float64 [1]: share of a bin that lacks a good destination


@numba.njit(cache=True)
def kind_of(size):
    """The size class: T to 1/4, S to 1/3, M to 1/2, L above."""
    if size > 1 / 2:
        return L
    if size > 1 / 3:
        return M
    return S if size > 1 / 4 else T


@numba.njit(cache=True)
def bin_kind(counts, b):
    """The class of a bin: that of its largest item, or EMPTY."""
    for kind in (L, M, S, T):
        if counts[kind, b] > 0:
            return kind
    return EMPTY


@numba.njit(cache=True)
def full_count(kind):
    """Items of class S, M or L that complete a bin of their class: 3, 2, 1."""
    return L + 1 - kind


@numba.njit(cache=True)
def is_incomplete(counts, b, kind):
    """True for a bin of this class with too few items of it."""
    return bin_kind(counts, b) == kind and counts[kind, b] < full_count(kind)


@numba.njit(cache=True)
def tier(counts, occupied, b, kind):
    """The tier of bin b in Allocate, for an item of this class that fits."""
    found = bin_kind(counts, b)
    if found == EMPTY:
        return ANY_FIT if occupied else NEW_BIN
    if kind == T:
        if found == L:
            return PARTNER
        if found == T:
            return OWN
        return FILLING  # gap 1: without T's on M-bins under 75 % the invariants do not hold
    if kind == L:
        return ANY_FIT
    if found == L:  # gap 3: one S or M beside an L
        return PARTNER if counts[L, b] == 1 and counts[S, b] + counts[M, b] == 0 else ANY_FIT
    return OWN if found == kind and counts[kind, b] < full_count(kind) else ANY_FIT


@numba.njit(cache=True)
def target(bins, size, slots, src, at_once, worst):
    """The bin where Allocate puts an item or a bundle; -1: none.

    size, slots  its share of a bin, and its number of requests
    src          excluded
    at_once      True: there must be room now; False: for an S or M, movable T's do not count
    worst        the worst tier allowed
    """
    found, best, best_key, kind = -1, NO_TIER, 0.0, kind_of(size)
    for b in range(len(bins.load)):
        if b == src or not bins.accepts[b] or bins.slots[b] < slots:
            continue
        load = (
            bins.load_now[b] if at_once else bins.load[b] - (bins.movable_t[b] if kind > T else 0.0)
        )
        if load + size > 1 + EPSILON:
            continue
        rank = tier(bins.counts, bins.occupied[b], b, kind)
        if rank > worst or rank > best:
            continue
        key = -float(bins.activated[b]) if rank == OWN and kind > T else _tightness(load, size)
        if rank < best or key < best_key:
            found, best, best_key = b, rank, key
    return found


@numba.njit(cache=True)
def _tightness(load, size):
    """Sort key: the fullest bin that keeps room to grow, or else the emptiest.

    Gap 5: the paper's priority (fewest requests, most free memory) is worst fit.
    """
    return 1 - load if load + size <= 1 - ROOM_TO_GROW else 1 + load


@numba.njit(cache=True)
def build(items, bins):
    """Compute classes, lists, counts and loads from `size`, `bin_of` and the initial `load`."""
    items.head[:] = -1
    for i in range(len(items.size)):
        items.kind[i] = kind_of(items.size[i])
        _link(items, bins, i, items.bin_of[i])
    bins.load_now[:] = bins.load


@numba.njit(cache=True)
def _link(items, bins, i, b):
    items.bin_of[i], items.prev[i], items.next[i] = b, -1, items.head[b]
    if items.head[b] >= 0:
        items.prev[items.head[b]] = i
    items.head[b] = i
    _account(items, bins, i, b, 1)


@numba.njit(cache=True)
def _unlink(items, bins, i):
    b = items.bin_of[i]
    if items.prev[i] >= 0:
        items.next[items.prev[i]] = items.next[i]
    else:
        items.head[b] = items.next[i]
    if items.next[i] >= 0:
        items.prev[items.next[i]] = items.prev[i]
    _account(items, bins, i, b, -1)


@numba.njit(cache=True)
def _account(items, bins, i, b, sign):
    bins.load[b] += sign * items.size[i]
    bins.counts[items.kind[i], b] += sign
    if items.kind[i] == T and not items.pinned[i]:
        bins.movable_t[b] += sign * items.size[i]


@numba.njit(cache=True)
def move(items, bins, members, b, rule):
    """Move these items to bin b as one bundle."""
    items.num_moves[0] += 1
    for i in members:
        bins.slots[items.bin_of[i]] += 1
        _unlink(items, bins, i)
        _link(items, bins, i, b)
        items.bundle[i], items.rule[i] = items.num_moves[0], rule
        bins.load_now[b] += items.size[i]
    bins.slots[b] -= len(members)


@numba.njit(cache=True)
def bundles(items, bins, b):
    """(members, bounds, sizes) of the bin's movable T's; p: members[bounds[p]:bounds[p + 1]].

    Largest first; a T over 1/8 is its own bundle, smaller ones are joined until they exceed 1/8.
    """
    number = 0
    i = items.head[b]
    members = np.empty(bins.counts[T, b], np.int64)
    while i >= 0:
        if items.kind[i] == T and not items.pinned[i]:
            members[number] = i
            number += 1
        i = items.next[i]
    members = np.sort(members[:number])
    members = members[np.argsort(-items.size[members], kind="mergesort")]
    bounds, sizes = np.zeros(number + 1, np.int64), np.zeros(number)
    p = 0
    for k in range(number):
        sizes[p] += items.size[members[k]]
        if sizes[p] > TINY or k == number - 1:
            p += 1
            bounds[p] = k + 1
    return members, bounds[: p + 1], sizes[:p]


@numba.njit(cache=True)
def allocate(
    capacity, free, ordered, num_requests, max_requests, token_bytes, state, able, hosting,
    activated, counts, need, grown, tokens,
):  # fmt: skip
    """The worker where Allocate puts a request of `need` bytes; -1: none.

    While no worker can be activated, ANY_FIT is allowed as well.
    capacity … activated  columns of the ledger; `able` and `hosting` are those of the model
    counts                int64 [classes, workers + 1]: requests by class
    grown                 bytes of the request at the end of the lead time
    tokens                growth of every request within the lead time
    """
    found, best, best_key = -1, NO_TIER, 0.0
    worst = NEW_BIN if can_be_activated(state, able) else ANY_FIT
    for w in range(len(capacity)):
        left = free[w] - ordered[w]
        if not hosting[w] or left < need or num_requests[w] >= max_requests[w]:
            continue
        size, growth = min(grown, capacity[w]), tokens * token_bytes[w] * num_requests[w]
        if left - growth < size - EPSILON * capacity[w]:
            continue
        load, share = 1 - (left - growth) / capacity[w], size / capacity[w]
        rank = tier(counts, num_requests[w] > 0, w, kind_of(share))
        if rank > worst or rank > best:
            continue
        own = rank == OWN and kind_of(share) > T
        key = -float(activated[w]) if own else _tightness(load, share)
        if rank < best or key < best_key:
            found, best, best_key = w, rank, key
    return found
