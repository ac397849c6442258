"""The rule of `frugal` on an idealised cluster, compiled.

Placements, reliefs and drains use the policy's own kernels. Time is in decode steps, KV in tokens;
workers are rows 1 … W, row 0 stands for no worker, and there is always an empty worker.
"""

from typing import NamedTuple

import numba
import numpy as np

from mellmpi.scheduler.policies.kernels import best_placement, best_relief, empty_worker

MAX_REQUESTS = 512  # on each worker
ARRIVALS, RELIEFS, NOTHING = range(3)  # the stage from which a step is continued


class Requests(NamedTuple):
    """int64 [requests] each, in the order of arrival."""

    arrival: np.ndarray  # step
    prompt: np.ndarray  # tokens
    end: np.ndarray  # step


class Rule(NamedTuple):
    """The constants of `frugal`, in tokens."""

    capacity: float  # of each worker
    rate: float  # tokens a second of each request
    round_steps: int  # steps from one rebalancing round to the next
    end_rate: float  # ends a second that each request adds, weighted
    price: float  # cost of each token moved
    keep_s: float  # least time to overflow after a placement
    lead_s: float  # a relief starts this long before an overflow
    cluster_s: float  # least time to overflow of all workers together after a drain
    extra_workers: float  # workers' capacity to be free besides for each failed drain
    max_failures: int  # consecutive failed drains
    params: tuple[float, float, float]  # of `kernels.placement_cost`


class Cluster(NamedTuple):
    """Requests on workers, and the columns that the kernels see; overwritten by the functions."""

    free: np.ndarray  # float64 [workers + 1], tokens
    growth: np.ndarray  # float64 [workers + 1], tokens a second
    end_rate: np.ndarray  # float64 [workers + 1], ends a second, weighted
    number: np.ndarray  # int64 [workers + 1], requests
    on: np.ndarray  # int64 [workers + 1, MAX_REQUESTS], requests
    accepts: np.ndarray  # bool [workers + 1]: not the source of a move in this round
    is_destination: np.ndarray  # bool [workers + 1]: of a move in this round


@numba.njit(cache=True)
def copy(cluster, to):
    to.free[:], to.growth[:], to.end_rate[:] = cluster.free, cluster.growth, cluster.end_rate
    to.number[:], to.accepts[:] = cluster.number, cluster.accepts
    to.is_destination[:] = cluster.is_destination
    for w in range(len(cluster.number)):
        to.on[w, : cluster.number[w]] = cluster.on[w, : cluster.number[w]]


@numba.njit(cache=True)
def size_of(r, requests, step):
    return float(requests.prompt[r] + step - requests.arrival[r])


@numba.njit(cache=True)
def is_round(step, requests, rule):
    return (step - requests.arrival[0]) % rule.round_steps == rule.round_steps // 2


@numba.njit(cache=True)
def advance(cluster, requests, rule, step):
    """Go to this step: remove requests that have ended, let the others grow, begin a round."""
    if is_round(step, requests, rule):
        cluster.accepts[:], cluster.is_destination[:] = True, False
    for w in range(1, len(cluster.number)):
        held, i = 0.0, 0
        while i < cluster.number[w]:
            r = cluster.on[w, i]
            if requests.end[r] > step:
                held += size_of(r, requests, step)
                i += 1
            else:
                cluster.number[w] -= 1
                cluster.on[w, i] = cluster.on[w, cluster.number[w]]
        cluster.free[w] = rule.capacity - held
        cluster.growth[w] = rule.rate * cluster.number[w]
        cluster.end_rate[w] = rule.end_rate * cluster.number[w]


@numba.njit(cache=True)
def move(cluster, requests, rule, step, arrival, src, pair):
    """Place an arrival (src 0), or move a request by its (index, destination); return its tokens.

    The memory of the source is free from the next round on.
    """
    i, dst = pair
    r = cluster.on[src, i] if src else arrival
    size = size_of(r, requests, step)
    cluster.on[dst, cluster.number[dst]] = r
    cluster.number[dst] += 1
    cluster.free[dst] -= size
    cluster.growth[dst] += rule.rate
    cluster.end_rate[dst] += rule.end_rate
    if src:
        cluster.number[src] -= 1
        cluster.on[src, i] = cluster.on[src, cluster.number[src]]
        cluster.growth[src] -= rule.rate
        cluster.end_rate[src] -= rule.end_rate
        cluster.accepts[src], cluster.is_destination[dst] = False, True
    return size


@numba.njit(cache=True)
def first_empty(cluster):
    for w in range(1, len(cluster.number)):
        if cluster.number[w] == 0 and cluster.accepts[w]:
            return w
    raise ValueError("no worker is empty: give the search more of them")


@numba.njit(cache=True)
def placements(cluster, rule, size, choices):
    """int64 [n, 2]: (unused, worker) for an arrival, best first; if none fits, an empty worker."""
    rows = len(cluster.free)
    none, one, most = np.zeros(rows), np.ones(rows), np.full(rows, MAX_REQUESTS)
    state, accepts = np.zeros(rows, np.int8), np.ones(rows, np.bool_)
    found, n = np.zeros((choices, 2), np.int64), 0
    while n < choices:
        w = best_placement(
            cluster.free, none, cluster.number, most, one, one, state, accepts,
            cluster.growth, accepts, size, rule.rate, rule.end_rate, rule.rate,
            0.0, rule.keep_s, rule.params,
        )  # fmt: skip
        if w == 0:
            break
        found[n, 1], accepts[w] = w, False
        n += 1
    if n == 0:
        found[0, 1], n = first_empty(cluster), 1
    return found[:n]


@numba.njit(cache=True)
def columns(cluster, requests, rule, step, w):
    """(size, size_growth, model, runs) of the requests on a worker, for the kernels."""
    n, runs = cluster.number[w], np.ones((1, len(cluster.free)), np.bool_)
    size = np.array([size_of(r, requests, step) for r in cluster.on[w, :n]])
    return size, np.full(n, rule.rate), np.zeros(n, np.int64), runs


@numba.njit(cache=True)
def reliefs(cluster, requests, rule, step, src, choices):
    """int64 [n, 2]: (index, destination) of moves away from `src`, best first.

    Each destination occurs once; after all busy workers comes an empty one.
    """
    size, size_growth, model, runs = columns(cluster, requests, rule, step, src)
    may = cluster.accepts & (cluster.number > 0) & (cluster.number < MAX_REQUESTS)
    may[src] = False
    found, n, opened = np.zeros((choices, 2), np.int64), 0, False
    while n < choices:
        i, dst = best_relief(
            size, size_growth, model, runs, cluster.free, cluster.growth, cluster.end_rate, may,
            src, rule.end_rate, rule.price, 0.0 if opened else rule.keep_s, rule.params,
        )  # fmt: skip
        if dst:
            found[n, 0], found[n, 1], may[dst] = i, dst, False
            n += 1
        elif opened:
            break
        else:
            opened = True
            may[:] = False
            may[first_empty(cluster)] = True
    return found[:n]


@numba.njit(cache=True)
def is_crowded(cluster, rule, w):
    due = cluster.free[w] < rule.lead_s * cluster.growth[w]
    return due and cluster.number[w] > 1 and cluster.accepts[w]


@numba.njit(cache=True)
def drain(cluster, requests, rule, step):
    """As `frugal.draining.drain`; returns (requests, tokens) moved."""
    busy = cluster.number > 0
    accepts, slots = cluster.accepts & busy, MAX_REQUESTS - cluster.number
    victims = np.argsort(-np.where(busy, cluster.free, -np.inf), kind="mergesort")[: busy.sum()]
    spare = np.sum(cluster.free[busy])
    keep = rule.cluster_s * np.sum(cluster.growth[busy])
    failures, moves, tokens = 0, 0, 0.0
    for w in victims:
        needed = (1 + failures * rule.extra_workers) * rule.capacity
        if failures == rule.max_failures or spare - needed < keep:
            break
        m, moved = 0, 0.0
        if cluster.accepts[w] and not cluster.is_destination[w]:
            m, moved = empty(cluster, requests, rule, step, w, accepts, slots)
        failures = 0 if m else failures + 1
        spare -= rule.capacity if m else 0.0
        moves, tokens = moves + m, tokens + moved
    return moves, tokens


@numba.njit(cache=True)
def empty(cluster, requests, rule, step, w, accepts, slots):
    """Move all requests of a worker to others, or none; return (requests, tokens) moved."""
    size, size_growth, model, runs = columns(cluster, requests, rule, step, w)
    order, n = np.argsort(-size, kind="mergesort"), cluster.number[w]
    dst = np.zeros(n, np.int64)
    accepts[w] = False
    if not empty_worker(
        size[order], size_growth, model, runs, cluster.free, cluster.growth, cluster.end_rate,
        slots, accepts, w, rule.end_rate, rule.price, rule.keep_s, rule.params, dst,
    ):  # fmt: skip
        accepts[w] = True
        return 0, 0.0
    for k in range(n):  # the kernel has updated the columns of the destinations
        cluster.on[dst[k], cluster.number[dst[k]]] = cluster.on[w, order[k]]
        cluster.number[dst[k]] += 1
        cluster.is_destination[dst[k]] = True
    cluster.number[w], cluster.accepts[w] = 0, False
    cluster.free[w], cluster.growth[w], cluster.end_rate[w] = rule.capacity, 0.0, 0.0
    return n, np.sum(size)


@numba.njit(cache=True)
def follow(cluster, requests, rule, arrived, step, stage):
    """Finish one step by the rule, from this stage on; return (requests arrived, moves)."""
    moves = 0
    if stage == ARRIVALS:
        advance(cluster, requests, rule, step)
        while arrived < len(requests.arrival) and requests.arrival[arrived] <= step:
            found = placements(cluster, rule, size_of(arrived, requests, step), 1)
            move(cluster, requests, rule, step, arrived, 0, found[0])
            arrived += 1
    if is_round(step, requests, rule):
        for w in range(1, len(cluster.free)):
            if stage <= RELIEFS and is_crowded(cluster, rule, w):
                for pair in reliefs(cluster, requests, rule, step, w, 1):
                    move(cluster, requests, rule, step, -1, w, pair)
                    moves += 1
        if stage != NOTHING:
            moves += drain(cluster, requests, rule, step)[0]
    return arrived, moves
