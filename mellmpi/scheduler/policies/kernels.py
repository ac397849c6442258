"""The inner loops of `frugal`: arrays in, an answer out. Compiled; each with its Python twin.

Workers are rows 1 … W, row 0 is nobody. Bytes are float64 here. Three columns say how a worker
fares, and of a request the like is added to them:

room     bytes left
growth   bytes a second
leaving  requests a second that are expected to end

`par` is what a strain is made of, (urgency, 1 / urgent_s, 1 / idle_s); see `strain`.
"""

import math

import numba
import numpy as np

from mellmpi.scheduler.ledger import WorkerState

BEYOND = 100.0  # strain: worse than anything that averts the overflow
ACTIVE, LOST = int(WorkerState.ACTIVE), int(WorkerState.LOST)
MOST = 16  # requests of one worker that are looked at: if it has more, they are small


@numba.njit(cache=True)
def decay(x):  # type: ignore[no-untyped-def]
    """exp(-x), nearly, and nothing from 16 on. Far cheaper, and smooth all the same."""
    y = max(0.0, 1 - x / 16)
    y *= y
    y *= y
    y *= y
    return y * y


@numba.njit(cache=True)
def strain(room, growth, leaving, par):  # type: ignore[no-untyped-def]
    """What a worker's state costs: the overflow to come, and the room that lies idle till then.

    The overflow counts the less the later it is, and the likelier that somebody leaves before.
    """
    urgency, urgent, idle = par
    left_s = max(room, 0.0) / max(growth, 1e-9)
    return urgency * decay(left_s * (urgent + leaving)) + 1 - decay(left_s * idle)


@numba.njit(cache=True)
def _least_strained(room, growth, leaving, before, may, need, grows, leaves, keep_s, par):  # type: ignore[no-untyped-def]
    best, least, least_s = 0, math.inf, math.inf
    for w in range(1, len(room)):
        if may[w]:
            left, rate = room[w] - need, growth[w] + grows
            if left >= 0 and left >= keep_s * rate:
                added = strain(left, rate, leaving[w] + leaves, par) - before[w]
                left_s = left / max(rate, 1e-9)
                if added < least - 1e-9 or (added < least + 1e-9 and left_s < least_s):
                    best, least, least_s = w, added, left_s
    return best, least


@numba.njit(cache=True)
def strains(room, growth, leaving, par):  # type: ignore[no-untyped-def]
    """float64 [workers + 1]: `strain` of each."""
    found = np.empty(len(room))
    for w in range(len(room)):
        found[w] = strain(room[w], growth[w], leaving[w], par)
    return found


@numba.njit(cache=True, error_model="numpy")
def place_on(
    free,
    ordered,
    number,
    most,
    token_bytes,
    block_bytes,
    state,
    able,
    growth,
    takes,  # type: ignore[no-untyped-def]
    need,
    grows,
    leaves,
    rate,
    answer,
    keep_s,
    par,
):
    """The worker in use whose strain `need` more bytes raise least, or 0; of equals, the fullest.

    free … able    columns of the ledger, `able` that of the model; takes: bool, hosts it now
    growth         bytes a second, as measured; used while `rate`, tokens a second, is unknown: 0
    grows, leaves  what the request adds to growth and leaving; keep_s: time to overflow to be left
    answer         tokens a request that are to stay free, if no worker more can come
    """
    if more_can_come(state, able):
        answer = 0.0
    urgency, urgent, idle = par
    best, least, least_s = 0, math.inf, math.inf
    for w in range(1, len(free)):
        n = number[w]
        if not takes[w] or n == 0 or n >= most[w]:
            continue
        # Half a block a request is missing to whole ones, on average.
        kept = block_bytes[w] / 2 if block_bytes[w] > token_bytes[w] else 0.0
        room = free[w] - ordered[w] - n * max(kept, answer * token_bytes[w])
        faster = n * token_bytes[w] * rate if rate > 0 else growth[w]
        left, after = room - need - kept, faster + grows
        if left < 0 or left < keep_s * after:
            continue
        before_s, left_s = room / max(faster, 1e-9), left / max(after, 1e-9)
        added = urgency * (
            decay(left_s * (urgent + (n + 1) * leaves)) - decay(before_s * (urgent + n * leaves))
        )
        added += decay(before_s * idle) - decay(left_s * idle)
        if added < least - 1e-9 or (added < least + 1e-9 and left_s < least_s):
            best, least, least_s = w, added, left_s
    return best


@numba.njit(cache=True)
def more_can_come(state, able):  # type: ignore[no-untyped-def]
    """Can waiting bring a worker of this model that is not active now?"""
    return np.any(able & (state > ACTIVE) & (state < LOST))


@numba.njit(cache=True)
def relief(size, grow, model, runs, room, growth, leaving, may, worker, leaves, price, keep_s, par):  # type: ignore[no-untyped-def]
    """(row, destination) whose move leaves least strain, or (-1, 0). Rows are of one full worker.

    size, grow   float64 [n]: bytes, bytes a second; model int64 [n], rows of `runs`
    runs         bool [models, workers + 1]; may bool [workers + 1]: takes something
    leaves       of one request, what it adds to `leaving`; price: strain a byte that is moved
    keep_s       time to overflow that the destination must keep at least
    If the source overflows all the same, the largest goes first: that is a beginning.
    """
    before = strains(room, growth, leaving, par)
    order = np.argsort(-size, kind="mergesort")  # of equals, the first one first
    step = max(1.0, len(order) / MOST)
    best, row, dst = math.inf, -1, 0
    for k in range(min(MOST, len(order))):
        i = order[int(k * step)]
        rest, bytes_left = max(growth[worker] - grow[i], 0.0), room[worker] + size[i]
        source = strain(bytes_left, rest, leaving[worker] - leaves, par) + price * size[i]
        if bytes_left < 0:
            source = BEYOND - bytes_left * price
        if source - 1 - par[0] >= best:
            continue
        target, added = _least_strained(
            room,
            growth,
            leaving,
            before,
            may & runs[model[i]],
            size[i],
            grow[i],
            leaves,
            keep_s,
            par,
        )
        if target and source + added < best:
            best, row, dst = source + added, i, target
    return row, dst


@numba.njit(cache=True)
def emptied(
    size,
    grow,
    model,
    runs,
    room,
    growth,
    leaving,
    seats,
    may,  # type: ignore[no-untyped-def]
    worker,
    leaves,
    price,
    keep_s,
    par,
    dst,
):
    """Can all requests of a worker go elsewhere with less strain than now? `dst` says where.

    As in `relief`, largest first; dst int64 [n], written.
    room, growth, leaving, seats are changed only if the answer is True.
    """
    spent = -strain(room[worker], growth[worker], leaving[worker], par)
    before = strains(room, growth, leaving, par)
    done = 0
    for i in range(len(size)):
        dst[i], added = _least_strained(
            room,
            growth,
            leaving,
            before,
            may & runs[model[i]] & (seats > 0),
            size[i],
            grow[i],
            leaves,
            keep_s,
            par,
        )
        if dst[i] == 0:
            break
        spent += added + price * size[i]
        _put(room, growth, leaving, seats, dst[i], size[i], grow[i], leaves, 1)
        before[dst[i]] += added
        done += 1
    if done == len(size) and spent <= 1e-9:
        return True
    for i in range(done):
        _put(room, growth, leaving, seats, dst[i], size[i], grow[i], leaves, -1)
    return False


@numba.njit(cache=True)
def _put(room, growth, leaving, seats, w, size, grow, leaves, sign):  # type: ignore[no-untyped-def]
    room[w] -= sign * size
    growth[w] += sign * grow
    leaving[w] += sign * leaves
    seats[w] -= sign


def warm_up() -> None:
    """Compile everything now rather than when the first request waits for it."""
    room, growth, yes = np.ones(2), np.ones(2), np.ones(2, np.bool_)
    ints, none = np.ones(2, np.int64), np.zeros(1, np.int64)
    size, runs, par = np.ones(1), np.ones((1, 2), np.bool_), (1.0, 1.0, 1.0)
    place_on(
        ints,
        ints,
        ints,
        ints,
        room,
        ints,
        ints.astype(np.int8),
        yes,
        growth,
        yes,
        1,
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
        par,
    )
    relief(size, size, none, runs, room, growth, growth, yes, 1, 1.0, 1.0, 1.0, par)
    emptied(
        size,
        size,
        none,
        runs,
        room,
        growth,
        room.copy(),
        ints,
        yes,
        1,
        1.0,
        1.0,
        1.0,
        par,
        none.copy(),
    )
