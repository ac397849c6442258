"""What MELL's rules are written in: workers as bins, requests as items, classes, pieces, targets.

Compiled; plain Python is the twin (NUMBA_DISABLE_JIT=1). A bin bears the class of its largest
item. T's that are at most 1/8 travel in pieces of (1/8, 1/4]: a multi-item is formed by what moves
together, so nothing has to be kept when a member grows, ends, or leaves the others.
"""

from typing import NamedTuple

import numba
import numpy as np

from mellmpi.scheduler.policies.kernels import more_can_come

EMPTY, T, S, M, L = 0, 1, 2, 3, 4
FULL_ENOUGH = 0.75
SMALL = 1 / 8
ROOM_TO_GROW = 0.05
EPSILON = 1e-9  # of rounding in sums of shares
# Where Allocate puts something, best first; LAST is where it fits although no rule wants it there.
PARTNER, FILLING, OWN, OPENED, LAST, NOWHERE = 0, 1, 2, 3, 4, 5
OVERFLOW, PAIR, GATHER, FILL = 0, 1, 2, 3  # rules that move; index of REASONS
REASONS = "overflow", "pair", "gather", "fill"


class Bins(NamedTuple):
    """Workers of one size, one an entry. Loads are shares of a bin."""

    load: np.ndarray  # float64 [bins]: share in use, with what is on its way here
    soft: np.ndarray  # float64 [bins]: share of T's that can go elsewhere
    num: np.ndarray  # int64 [classes, bins]: items of each class
    age: np.ndarray  # int64 [bins]: the higher, the later it was activated
    seats: np.ndarray  # int64 [bins]: so many items more
    usable: np.ndarray  # bool [bins]: may take items
    held: np.ndarray  # bool [bins]: not empty, be it of what is on its way
    now: np.ndarray  # float64 [bins]: load, but what leaves is there until the next epoch


class Items(NamedTuple):
    """Requests that are on a bin; a doubly linked list a bin."""

    size: np.ndarray  # float64 [items]: share of a bin
    kind: np.ndarray  # int64 [items]
    where: np.ndarray  # int64 [items]: bin
    pinned: np.ndarray  # bool [items]: stays where it is
    piece: np.ndarray  # int64 [items]: those of one number were moved as one; 0: never moved
    after: np.ndarray  # int64 [items]: next one on the same bin, or -1
    before: np.ndarray  # int64 [items]
    first: np.ndarray  # int64 [bins], or -1
    why: np.ndarray  # int64 [items]: which rule moved it last
    made: np.ndarray  # int64 [1]: pieces moved
    homeless: np.ndarray  # float64 [1]: share of a bin that had no good place to go to


@numba.njit(cache=True)
def kind_of(size):  # type: ignore[no-untyped-def]
    """T to 1/4, S to 1/3, M to 1/2, L above."""
    if size > 1 / 2:
        return L
    if size > 1 / 3:
        return M
    return S if size > 1 / 4 else T


@numba.njit(cache=True)
def bears(num, b):  # type: ignore[no-untyped-def]
    """The class of a bin: that of its largest item."""
    for kind in (L, M, S, T):
        if num[kind, b] > 0:
            return kind
    return EMPTY


@numba.njit(cache=True)
def whole(kind):  # type: ignore[no-untyped-def]
    """So many S, M or L make a bin of their class complete."""
    return L + 1 - kind


@numba.njit(cache=True)
def lacks(num, b, kind):  # type: ignore[no-untyped-def]
    """Is it an S-GPU (M-GPU) that is not whole?"""
    return bears(num, b) == kind and num[kind, b] < whole(kind)


@numba.njit(cache=True)
def tier(num, held, b, kind):  # type: ignore[no-untyped-def]
    """How much Allocate wants an item of this class on this bin, if it fits."""
    bin_kind = bears(num, b)
    if bin_kind == EMPTY:
        return LAST if held else OPENED
    if kind == T:
        if bin_kind == L:
            return PARTNER
        if bin_kind == T:
            return OWN
        return FILLING  # gap 1: without T's on M-GPUs under 75 % the invariants do not hold
    if kind == L:
        return LAST
    if bin_kind == L:  # gap 3: one S or M beside an L
        return PARTNER if num[L, b] == 1 and num[S, b] + num[M, b] == 0 else LAST
    return OWN if bin_kind == kind and num[kind, b] < whole(kind) else LAST


@numba.njit(cache=True)
def target(bins, size, seats, leave, at_once, last):  # type: ignore[no-untyped-def]
    """The bin where Allocate puts one item, or the members of one piece; -1: there is none.

    size, seats  its share of a bin, and how many requests it is
    leave        not here
    at_once      there is room now; else T's that can go elsewhere are no obstacle to an S or M
    last         the worst tier that will do
    """
    found, best, best_key, kind = -1, NOWHERE, 0.0, kind_of(size)
    for b in range(len(bins.load)):
        if b == leave or not bins.usable[b] or bins.seats[b] < seats:
            continue
        load = bins.now[b] if at_once else bins.load[b] - (bins.soft[b] if kind > T else 0.0)
        if load + size > 1 + EPSILON:
            continue
        rank = tier(bins.num, bins.held[b], b, kind)
        if rank > last or rank > best:
            continue
        key = -float(bins.age[b]) if rank == OWN and kind > T else _tightness(load, size)
        if rank < best or key < best_key:
            found, best, best_key = b, rank, key
    return found


@numba.njit(cache=True)
def _tightness(load, size):  # type: ignore[no-untyped-def]
    """Lower is better: the fullest bin that keeps room to grow, or else the emptiest.

    Gap 5: the paper's priority (fewest requests, most free memory) is worst fit.
    """
    return 1 - load if load + size <= 1 - ROOM_TO_GROW else 1 + load


@numba.njit(cache=True)
def fill_in(items, bins):  # type: ignore[no-untyped-def]
    """Lists, loads and counts, from `size`, `where` and what `bins.load` already holds."""
    items.first[:] = -1
    for i in range(len(items.size)):
        items.kind[i] = kind_of(items.size[i])
        _link(items, bins, i, items.where[i])
    bins.now[:] = bins.load


@numba.njit(cache=True)
def _link(items, bins, i, b):  # type: ignore[no-untyped-def]
    items.where[i], items.before[i], items.after[i] = b, -1, items.first[b]
    if items.first[b] >= 0:
        items.before[items.first[b]] = i
    items.first[b] = i
    _account(items, bins, i, b, 1)


@numba.njit(cache=True)
def _unlink(items, bins, i):  # type: ignore[no-untyped-def]
    b = items.where[i]
    if items.before[i] >= 0:
        items.after[items.before[i]] = items.after[i]
    else:
        items.first[b] = items.after[i]
    if items.after[i] >= 0:
        items.before[items.after[i]] = items.before[i]
    _account(items, bins, i, b, -1)


@numba.njit(cache=True)
def _account(items, bins, i, b, sign):  # type: ignore[no-untyped-def]
    bins.load[b] += sign * items.size[i]
    bins.num[items.kind[i], b] += sign
    if items.kind[i] == T and not items.pinned[i]:
        bins.soft[b] += sign * items.size[i]


@numba.njit(cache=True)
def move(items, bins, members, b, why):  # type: ignore[no-untyped-def]
    """All of them go there as one."""
    items.made[0] += 1
    for i in members:
        bins.seats[items.where[i]] += 1
        _unlink(items, bins, i)
        _link(items, bins, i, b)
        items.piece[i], items.why[i] = items.made[0], why
        bins.now[b] += items.size[i]
    bins.seats[b] -= len(members)


@numba.njit(cache=True)
def pieces(items, bins, b):  # type: ignore[no-untyped-def]
    """(members, bounds, sizes): the bin's T's that can move, piece p in bounds[p : p + 2].

    Alone, or the small ones together, the largest first: all pieces but one are over 1/8.
    """
    number = 0
    i = items.first[b]
    members = np.empty(bins.num[T, b], np.int64)
    while i >= 0:
        if items.kind[i] == T and not items.pinned[i]:
            members[number] = i
            number += 1
        i = items.after[i]
    members = np.sort(members[:number])
    members = members[np.argsort(-items.size[members], kind="mergesort")]
    bounds, sizes = np.zeros(number + 1, np.int64), np.zeros(number)
    p = 0
    for k in range(number):
        sizes[p] += items.size[members[k]]
        if sizes[p] > SMALL or k == number - 1:
            p += 1
            bounds[p] = k + 1
    return members, bounds[: p + 1], sizes[:p]


@numba.njit(cache=True)
def allocate(
    capacity,
    free,
    ordered,
    num_requests,
    max_requests,
    token_bytes,
    state,
    able,  # type: ignore[no-untyped-def]
    hosting,
    age,
    num,
    need,
    grown,
    tokens,
):
    """Where Allocate puts `need` bytes that will be `grown`; a worker, or -1.

    If there is no worker to open, nor one to come, anywhere they fit. Columns of the ledger, `able`
    and `hosting` those of the model, and:
    num     int64 [classes, workers + 1]: requests by class
    tokens  by so many each request of a worker will have grown
    """
    found, best, best_key = -1, NOWHERE, 0.0
    last = OPENED if more_can_come(state, able) else LAST
    for w in range(len(capacity)):
        left = free[w] - ordered[w]
        if not hosting[w] or left < need or num_requests[w] >= max_requests[w]:
            continue
        size, growth = min(grown, capacity[w]), tokens * token_bytes[w] * num_requests[w]
        if left - growth < size - EPSILON * capacity[w]:
            continue
        load, share = 1 - (left - growth) / capacity[w], size / capacity[w]
        rank = tier(num, num_requests[w] > 0, w, kind_of(share))
        if rank > last or rank > best:
            continue
        own = rank == OWN and kind_of(share) > T
        key = -float(age[w]) if own else _tightness(load, share)
        if rank < best or key < best_key:
            found, best, best_key = w, rank, key
    return found
