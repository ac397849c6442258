"""The inner loops of `frugal`: arrays in, an answer out. Compiled; each with its Python twin.

Workers are rows 1 … W, row 0 is nobody. Bytes are float64 here. Time to overflow: room / growth.
"""

import math

import numba
import numpy as np


@numba.njit(cache=True)
def tightest(room, growth, may, need, grows, keep_s):  # type: ignore[no-untyped-def]
    """The allowed worker that `need` bytes leave the least time to overflow, or 0.

    room, growth  float64 [workers + 1]: bytes left, bytes a second; may bool, likewise
    need, grows   bytes, and bytes a second, of what is to be put there
    keep_s        so much time to overflow must be left at least
    """
    best, best_s = 0, math.inf
    for w in range(1, len(room)):
        if may[w]:
            left, rate = room[w] - need, growth[w] + grows
            if left >= 0 and left >= keep_s * rate:
                left_s = left / max(rate, 1e-9)
                if left_s < best_s:
                    best, best_s = w, left_s
    return best


@numba.njit(cache=True)
def relief(rows, size, grow, hosts, room, growth, may, worker, capacity, keep_s, par):  # type: ignore[no-untyped-def]
    """(row, destination) whose move helps a full worker most for its bytes, or (-1, 0).

    rows      int64 [n]: requests on `worker` that can be moved
    size      float64 [n]: bytes of each; grow: bytes a second of each
    hosts     bool [n, workers + 1]: where its model is
    par       (theta_s, price of bytes, price of room left over, its scale in seconds)
    The gain is the chance that somebody leaves the worker before it is full again:
    1 - exp(-t / theta).
    """
    theta_s, bytes_price, room_price, room_s = par
    best, row, dst = -math.inf, -1, 0
    for i in range(len(rows)):
        rest = max(growth[worker] - grow[i], 1e-9)
        after_s = (room[worker] + size[i]) / rest
        gain = 1 - math.exp(-after_s / theta_s) - bytes_price * size[i] / capacity
        if after_s <= 0:  # it overflows all the same: then the largest, as a beginning
            gain = size[i] / capacity - 1
        if gain <= best:
            continue
        target = tightest(room, growth, may & hosts[i], size[i], grow[i], keep_s)
        if target == 0:
            continue
        left_s = (room[target] - size[i]) / max(growth[target] + grow[i], 1e-9)
        score = gain - room_price * (1 - math.exp(-left_s / room_s))
        if score > best:
            best, row, dst = score, i, target
    return row, dst


@numba.njit(cache=True)
def emptied(size, grow, hosts, room, growth, seats, may, keep_s, dst):  # type: ignore[no-untyped-def]
    """Can all these requests go elsewhere? Then `dst` says where, and room is spoken for.

    size, grow, hosts as in `relief`, largest first; dst int64 [n], written
    room, growth, seats are changed only if the answer is True.
    """
    for i in range(len(size)):
        dst[i] = tightest(room, growth, may & hosts[i] & (seats > 0), size[i], grow[i], keep_s)
        if dst[i] == 0:
            for k in range(i):
                room[dst[k]] += size[k]
                growth[dst[k]] -= grow[k]
                seats[dst[k]] += 1
            return False
        room[dst[i]] -= size[i]
        growth[dst[i]] += grow[i]
        seats[dst[i]] -= 1
    return True


def warm_up() -> None:
    """Compile everything now rather than when the first request waits for it."""
    one, yes = np.ones(2), np.ones(2, np.bool_)
    hosts, rows, dst = np.ones((1, 2), np.bool_), np.zeros(1, np.int64), np.zeros(1, np.int64)
    tightest(one, one, yes, 0.5, 0.1, 0.1)
    relief(rows, one[:1], one[:1], hosts, one, one, yes, 1, 1.0, 0.1, (1.0, 1.0, 1.0, 1.0))
    emptied(one[:1], one[:1], hosts, one.copy(), one.copy(), np.ones(2, np.int64), yes, 0.1, dst)
