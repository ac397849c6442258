# mypy: allow-untyped-defs
"""Inner loops of `frugal`, compiled with numba; `kernel.py_func` is the plain Python function.

Workers are rows 1 … W of all columns; row 0 stands for no worker. Bytes are float64. The kernels
see each worker as three columns, float64 [workers + 1], to which placed requests are added:

free      bytes free
growth    bytes a second by which its requests grow
end_rate  requests a second that are expected to end, weighted

`params` are (OVERFLOW_WEIGHT, 1 / overflow decay in s, 1 / idle decay in s) of the placement cost,
which `frugal.policy` explains.
"""

import math

import numba
import numpy as np

from mellmpi.scheduler.ledger import WorkerState

STILL_FULL = 100.0  # cost of a source that overflows even after a move: above any other cost
ACTIVE, LOST = int(WorkerState.ACTIVE), int(WorkerState.LOST)
MAX_CANDIDATES = 16  # requests of one worker that `best_relief` tries, spread over all sizes


@numba.njit(cache=True)
def decay(x):
    """(1 - x/16)^16, 0 from 16 on: a cheap and smooth approximation of exp(-x) for x >= 0."""
    y = max(0.0, 1 - x / 16)
    y *= y
    y *= y
    y *= y
    return y * y


@numba.njit(cache=True)
def placement_cost(free, growth, end_rate, params):
    """Cost of one worker's state: that of its overflow plus that of its idle memory."""
    weight, per_overflow_s, per_idle_s = params
    left_s = max(free, 0.0) / max(growth, 1e-9)
    return weight * decay(left_s * (per_overflow_s + end_rate)) + 1 - decay(left_s * per_idle_s)


@numba.njit(cache=True)
def _cheapest(
    free, growth, end_rate, before, may, need, need_growth, need_end_rate, keep_s, params
):
    """(worker, added cost) for one request; (0, inf) if it fits nowhere. Ties: least time left."""
    best, least, least_s = 0, math.inf, math.inf
    for w in range(1, len(free)):
        if may[w]:
            left, rate = free[w] - need, growth[w] + need_growth
            if left >= 0 and left >= keep_s * rate:
                added = placement_cost(left, rate, end_rate[w] + need_end_rate, params) - before[w]
                left_s = left / max(rate, 1e-9)
                if added < least - 1e-9 or (added < least + 1e-9 and left_s < least_s):
                    best, least, least_s = w, added, left_s
    return best, least


@numba.njit(cache=True)
def placement_costs(free, growth, end_rate, params):
    """float64 [workers + 1]: `placement_cost` of each worker."""
    costs = np.empty(len(free))
    for w in range(len(free)):
        costs[w] = placement_cost(free[w], growth[w], end_rate[w], params)
    return costs


@numba.njit(cache=True, error_model="numpy")
def best_placement(
    free, ordered, number, most, token_bytes, block_bytes, state, able, growth, accepts,
    need, need_growth, need_end_rate, rate, answer, keep_s, params,
):  # fmt: skip
    """The busy worker whose cost `need` more bytes raise least; 0: none. Ties: least time left.

    free … able       columns of the ledger; `able` is that of the request's model
    growth            measured bytes a second; used while `rate` is 0
    accepts           bool: takes requests of the model
    need_growth, need_end_rate  of the request
    rate              tokens a second of one request; 0: unknown
    answer            tokens to keep free for each request if no further worker can become active
    keep_s            least time to overflow after the placement
    """
    if can_be_activated(state, able):
        answer = 0.0
    weight, per_overflow_s, per_idle_s = params
    best, least, least_s = 0, math.inf, math.inf
    for w in range(1, len(free)):
        n = number[w]
        if not accepts[w] or n == 0 or n >= most[w]:
            continue
        # A request fills half of its last block, on average.
        kept = block_bytes[w] / 2 if block_bytes[w] > token_bytes[w] else 0.0
        room = free[w] - ordered[w] - n * max(kept, answer * token_bytes[w])
        before = n * token_bytes[w] * rate if rate > 0 else growth[w]
        left, after = room - need - kept, before + need_growth
        if left < 0 or left < keep_s * after:
            continue
        before_s, left_s = room / max(before, 1e-9), left / max(after, 1e-9)
        added = weight * (
            decay(left_s * (per_overflow_s + (n + 1) * need_end_rate))
            - decay(before_s * (per_overflow_s + n * need_end_rate))
        )
        added += decay(before_s * per_idle_s) - decay(left_s * per_idle_s)
        if added < least - 1e-9 or (added < least + 1e-9 and left_s < least_s):
            best, least, least_s = w, added, left_s
    return best


@numba.njit(cache=True)
def can_be_activated(state, able):
    """True if a worker that runs the model is neither active nor lost, so that it can be woken."""
    return np.any(able & (state > ACTIVE) & (state < LOST))


@numba.njit(cache=True)
def best_relief(
    size, size_growth, model, runs, free, growth, end_rate, may,
    worker, request_end_rate, price, keep_s, params,
):  # fmt: skip
    """(index, destination) of the move away from `worker` that costs least; (-1, 0): none.

    size, size_growth  float64 [n]: bytes, bytes a second of the worker's requests
    model              int64 [n]: rows of `runs`
    runs               bool [models, workers + 1]; may: bool [workers + 1], possible destinations
    request_end_rate   share of one request in `end_rate`
    price              cost of each byte moved
    keep_s             least time to overflow of the destination after the move
    If no single move averts the overflow, the largest request moves.
    """
    before = placement_costs(free, growth, end_rate, params)
    order = np.argsort(-size, kind="mergesort")  # stable
    step = max(1.0, len(order) / MAX_CANDIDATES)
    best, row, dst = math.inf, -1, 0
    for k in range(min(MAX_CANDIDATES, len(order))):
        i = order[int(k * step)]
        rest, left = max(growth[worker] - size_growth[i], 0.0), free[worker] + size[i]
        source = placement_cost(left, rest, end_rate[worker] - request_end_rate, params)
        source += price * size[i]
        if left < 0:
            source = STILL_FULL - left * price
        if source - 1 - params[0] >= best:
            continue  # a destination lowers its cost by 1 + weight at most
        target, added = _cheapest(
            free, growth, end_rate, before, may & runs[model[i]],
            size[i], size_growth[i], request_end_rate, keep_s, params,
        )  # fmt: skip
        if target and source + added < best:
            best, row, dst = source + added, i, target
    return row, dst


@numba.njit(cache=True)
def empty_worker(
    size, size_growth, model, runs, free, growth, end_rate, slots, may,
    worker, request_end_rate, price, keep_s, params, dst,
):  # fmt: skip
    """True if all requests of `worker` can move to others at no higher total cost.

    As in `best_relief`; slots: int64 [workers + 1], requests that each worker can still take.
    Writes the destinations to dst, int64 [n]. If True, the columns free, growth, end_rate and slots
    of the destinations are updated, else they are as before.
    """
    spent = -placement_cost(free[worker], growth[worker], end_rate[worker], params)
    before = placement_costs(free, growth, end_rate, params)
    done = 0
    for i in range(len(size)):
        dst[i], added = _cheapest(
            free, growth, end_rate, before, may & runs[model[i]] & (slots > 0),
            size[i], size_growth[i], request_end_rate, keep_s, params,
        )  # fmt: skip
        if dst[i] == 0:
            break
        spent += added + price * size[i]
        _add(free, growth, end_rate, slots, dst[i], size[i], size_growth[i], request_end_rate, 1)
        before[dst[i]] += added
        done += 1
    if done == len(size) and spent <= 1e-9:
        return True
    for i in range(done):
        _add(free, growth, end_rate, slots, dst[i], size[i], size_growth[i], request_end_rate, -1)
    return False


@numba.njit(cache=True)
def _add(free, growth, end_rate, slots, w, size, size_growth, request_end_rate, sign):
    """Add one request to a worker's columns (sign 1), or take it away (-1)."""
    free[w] -= sign * size
    growth[w] += sign * size_growth
    end_rate[w] += sign * request_end_rate
    slots[w] -= sign


def warm_up() -> None:
    """Compile all kernels, so that the first request does not wait for it."""
    free, growth, yes = np.ones(2), np.ones(2), np.ones(2, np.bool_)
    ints, zero, state = np.ones(2, np.int64), np.zeros(1, np.int64), np.ones(2, np.int8)
    size, runs, params = np.ones(1), np.ones((1, 2), np.bool_), (1.0, 1.0, 1.0)
    ledger = ints, ints, ints, ints, free, ints, state, yes
    best_placement(*ledger, growth, yes, 1, 1.0, 1.0, 1.0, 1.0, 1.0, params)
    workers, scalars = (free, growth, free.copy()), (1, 1.0, 1.0, 1.0, params)
    best_relief(size, size, zero, runs, *workers, yes, *scalars)
    empty_worker(size, size, zero, runs, *workers, ints, yes, *scalars, zero.copy())
