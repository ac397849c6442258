"""The rule of `frugal` on the idealised cluster, compiled, and a search that knows the future.

Places, reliefs and drains are those of the policy's own kernels. Time is in decode steps, KV in
tokens; workers are rows 1 … W, and an empty one is always there. A choice is tried by playing the
future up to a horizon with the rule deciding; what costs least is taken.
"""

from typing import NamedTuple

import numba
import numpy as np

from mellmpi.scheduler.policies.kernels import emptied, place_on, relief

SEATS = 512  # requests a worker
ARRIVALS, RELIEFS, NOTHING = range(3)  # what is left of a step


class Requests(NamedTuple):
    """int64 [requests] each, in the order of arrival."""

    arrival: np.ndarray  # step
    prompt: np.ndarray  # tokens
    end: np.ndarray  # step


class Rule(NamedTuple):
    """The constants of `frugal`, in tokens."""

    capacity: float  # of a worker
    rate: float  # tokens a second, of each request
    every: int  # steps from round to round
    leaves: float  # ends a second that a request adds, weighed
    price: float  # strain a token that is moved
    keep_s: float  # time to overflow that is left where something is put
    lead_s: float  # relief comes so long before an overflow
    fleet_s: float  # time to overflow of all others together, or no worker is emptied
    further: float  # workers' room more that it takes where one could not be emptied
    looks: int  # workers that are looked at for it
    par: tuple[float, float, float]  # see `kernels.strain`


class Search(NamedTuple):
    first: int  # step from which it decides; before, the rule
    choices: int  # tried at each decision; 1: the rule alone
    horizon: int  # steps
    gpu_moves: float  # moves that a GPU for a second is worth


class Cell(NamedTuple):
    """Who is where, and what the kernels see of it; row 0 is nobody."""

    room: np.ndarray  # float64 [workers + 1], tokens
    growth: np.ndarray  # float64 [workers + 1], tokens a second
    leaving: np.ndarray  # float64 [workers + 1], ends a second, weighed
    number: np.ndarray  # int64 [workers + 1], requests
    on: np.ndarray  # int64 [workers + 1, SEATS], requests
    takes: np.ndarray  # bool [workers + 1]: gave nothing in this round
    took: np.ndarray  # bool [workers + 1]: in this round


class Play(NamedTuple):
    """All of a run; `trial` is overwritten, to try things in."""

    requests: Requests
    rule: Rule
    search: Search
    cell: Cell
    trial: Cell


@numba.njit(cache=True)
def copy(cell, to):
    to.room[:], to.growth[:], to.leaving[:] = cell.room, cell.growth, cell.leaving
    to.number[:], to.takes[:], to.took[:] = cell.number, cell.takes, cell.took
    for w in range(len(cell.number)):
        to.on[w, : cell.number[w]] = cell.on[w, : cell.number[w]]


@numba.njit(cache=True)
def size_of(r, requests, step):
    return float(requests.prompt[r] + step - requests.arrival[r])


@numba.njit(cache=True)
def is_round(step, requests, rule):
    return (step - requests.arrival[0]) % rule.every == rule.every // 2


@numba.njit(cache=True)
def pass_time(cell, requests, rule, step):
    """Who has ended is gone, and the others have grown; a round begins, if one is due."""
    if is_round(step, requests, rule):
        cell.takes[:], cell.took[:] = True, False
    for w in range(1, len(cell.number)):
        held, i = 0.0, 0
        while i < cell.number[w]:
            r = cell.on[w, i]
            if requests.end[r] > step:
                held += size_of(r, requests, step)
                i += 1
            else:
                cell.number[w] -= 1
                cell.on[w, i] = cell.on[w, cell.number[w]]
        cell.room[w] = rule.capacity - held
        cell.growth[w] = rule.rate * cell.number[w]
        cell.leaving[w] = rule.leaves * cell.number[w]


@numba.njit(cache=True)
def give(cell, requests, rule, step, arrival, src, pair):
    """An arrival (src 0), or a row of a worker, to a destination; the tokens of it.

    What a source gets back is free in the next round only.
    """
    i, dst = pair
    r = cell.on[src, i] if src else arrival
    size = size_of(r, requests, step)
    cell.on[dst, cell.number[dst]] = r
    cell.number[dst] += 1
    cell.room[dst] -= size
    cell.growth[dst] += rule.rate
    cell.leaving[dst] += rule.leaves
    if src:
        cell.number[src] -= 1
        cell.on[src, i] = cell.on[src, cell.number[src]]
        cell.growth[src] -= rule.rate
        cell.leaving[src] -= rule.leaves
        cell.takes[src], cell.took[dst] = False, True
    return size


@numba.njit(cache=True)
def empty_one(cell):
    for w in range(1, len(cell.number)):
        if cell.number[w] == 0 and cell.takes[w]:
            return w
    raise ValueError("no worker is empty: give the search more of them")


@numba.njit(cache=True)
def places(cell, rule, size, choices):
    """int64 [n, 2]: (-, worker) for an arrival, best first; an empty one where nobody takes it."""
    rows = len(cell.room)
    none, one, most = np.zeros(rows), np.ones(rows), np.full(rows, SEATS)
    state, takes = np.zeros(rows, np.int8), np.ones(rows, np.bool_)
    found, n = np.zeros((choices, 2), np.int64), 0
    while n < choices:
        w = place_on(
            cell.room,
            none,
            cell.number,
            most,
            one,
            one,
            state,
            takes,
            cell.growth,
            takes,
            size,
            rule.rate,
            rule.leaves,
            rule.rate,
            0.0,
            rule.keep_s,
            rule.par,
        )
        if w == 0:
            break
        found[n, 1], takes[w] = w, False
        n += 1
    if n == 0:
        found[0, 1], n = empty_one(cell), 1
    return found[:n]


@numba.njit(cache=True)
def columns(cell, requests, rule, step, w):
    """(size, growth, model, runs) of who is on a worker, as the kernels take them."""
    n, runs = cell.number[w], np.ones((1, len(cell.room)), np.bool_)
    size = np.array([size_of(r, requests, step) for r in cell.on[w, :n]])
    return size, np.full(n, rule.rate), np.zeros(n, np.int64), runs


@numba.njit(cache=True)
def reliefs(cell, requests, rule, step, src, choices):
    """int64 [n, 2]: (row, destination) to relieve a worker, best first, no destination twice.

    After all that hold something, an empty one.
    """
    size, grow, model, runs = columns(cell, requests, rule, step, src)
    may = cell.takes & (cell.number > 0) & (cell.number < SEATS)
    may[src] = False
    found, n, opened = np.zeros((choices, 2), np.int64), 0, False
    while n < choices:
        i, dst = relief(
            size,
            grow,
            model,
            runs,
            cell.room,
            cell.growth,
            cell.leaving,
            may,
            src,
            rule.leaves,
            rule.price,
            0.0 if opened else rule.keep_s,
            rule.par,
        )
        if dst:
            found[n, 0], found[n, 1], may[dst] = i, dst, False
            n += 1
        elif opened:
            break
        else:
            opened = True
            may[:] = False
            may[empty_one(cell)] = True
    return found[:n]


@numba.njit(cache=True)
def crowded(cell, rule, w):
    due = cell.room[w] < rule.lead_s * cell.growth[w]
    return due and cell.number[w] > 1 and cell.takes[w]


@numba.njit(cache=True)
def drain(cell, requests, rule, step):
    """As `frugal_drain.drain`; (requests, tokens) moved."""
    busy = cell.number > 0
    takes, seats = cell.takes & busy, SEATS - cell.number
    victims = np.argsort(-np.where(busy, cell.room, -np.inf), kind="mergesort")[: busy.sum()]
    spare = np.sum(cell.room[busy])
    keep = rule.fleet_s * np.sum(cell.growth[busy])
    failed, moves, tokens = 0, 0, 0.0
    for w in victims:
        if failed == rule.looks or spare - (1 + failed * rule.further) * rule.capacity < keep:
            break
        m, moved = 0, 0.0
        if cell.takes[w] and not cell.took[w]:
            m, moved = empty(cell, requests, rule, step, w, takes, seats)
        failed = 0 if m else failed + 1
        spare -= rule.capacity if m else 0.0
        moves, tokens = moves + m, tokens + moved
    return moves, tokens


@numba.njit(cache=True)
def empty(cell, requests, rule, step, w, takes, seats):
    """All requests of a worker to others, or none; (requests, tokens) moved."""
    size, grow, model, runs = columns(cell, requests, rule, step, w)
    order, n = np.argsort(-size, kind="mergesort"), cell.number[w]
    dst = np.zeros(n, np.int64)
    takes[w] = False
    if not emptied(
        size[order],
        grow,
        model,
        runs,
        cell.room,
        cell.growth,
        cell.leaving,
        seats,
        takes,
        w,
        rule.leaves,
        rule.price,
        rule.keep_s,
        rule.par,
        dst,
    ):
        takes[w] = True
        return 0, 0.0
    for k in range(n):  # the columns of the destinations are up to date
        cell.on[dst[k], cell.number[dst[k]]] = cell.on[w, order[k]]
        cell.number[dst[k]] += 1
        cell.took[dst[k]] = True
    cell.number[w], cell.takes[w] = 0, False
    cell.room[w], cell.growth[w], cell.leaving[w] = rule.capacity, 0.0, 0.0
    return n, np.sum(size)


@numba.njit(cache=True)
def follow(cell, requests, rule, arrived, step, stage):
    """One step by the rule, from this stage on; (requests arrived, moves)."""
    moves = 0
    if stage == ARRIVALS:
        pass_time(cell, requests, rule, step)
        while arrived < len(requests.arrival) and requests.arrival[arrived] <= step:
            found = places(cell, rule, size_of(arrived, requests, step), 1)
            give(cell, requests, rule, step, arrived, 0, found[0])
            arrived += 1
    if is_round(step, requests, rule):
        for w in range(1, len(cell.room)):
            if stage <= RELIEFS and crowded(cell, rule, w):
                for pair in reliefs(cell, requests, rule, step, w, 1):
                    give(cell, requests, rule, step, -1, w, pair)
                    moves += 1
        if stage != NOTHING:
            moves += drain(cell, requests, rule, step)[0]
    return arrived, moves


@numba.njit(cache=True)
def cost(cell, requests, rule, arrived, step, stage, search):
    """Moves and GPU seconds at their price up to the horizon, the rule deciding from now on."""
    moves, busy_steps, until = 0, 0, step + search.horizon
    while step < until:
        arrived, more = follow(cell, requests, rule, arrived, step, stage)
        moves, stage, began = moves + more, ARRIVALS, step
        step += 1
        due = requests.arrival[arrived] if arrived < len(requests.arrival) else until
        while step < min(due, until) and not is_round(step, requests, rule):
            step += 1
        busy_steps += np.sum(cell.number > 0) * (step - began)
    return moves + search.gpu_moves * busy_steps / rule.rate


@numba.njit(cache=True)
def choose(play, found, arrived, step, src, stage):
    """Which of these (row, destination) costs least in the end; src 0: for who arrived last."""
    if len(found) == 1:
        return 0
    best, least = 0, np.inf
    for j in range(len(found)):
        copy(play.cell, play.trial)
        give(play.trial, play.requests, play.rule, step, arrived - 1, src, found[j])
        spent = cost(play.trial, play.requests, play.rule, arrived, step, stage, play.search)
        if spent < least - 1e-9:
            best, least = j, spent
    return best


@numba.njit(cache=True)
def drain_or_not(play, arrived, step, choices):
    """(requests, tokens) moved."""
    cell, trial, requests, rule, search = (
        play.cell,
        play.trial,
        play.requests,
        play.rule,
        play.search,
    )
    if choices > 1:
        copy(cell, trial)
        moves = drain(trial, requests, rule, step)[0]
        if moves == 0:
            return 0, 0.0
        spent = moves + cost(trial, requests, rule, arrived, step, NOTHING, search)
        copy(cell, trial)
        if spent >= cost(trial, requests, rule, arrived, step, NOTHING, search):
            return 0, 0.0
    return drain(cell, requests, rule, step)


@numba.njit(cache=True)
def act(play, arrived, step, choices):
    """One round, reliefs and then drains: [requests moved, tokens of them, workers too full]."""
    cell, requests, rule = play.cell, play.requests, play.rule
    moves, tokens, overflows = 0, 0.0, np.sum(cell.room < 0)
    for w in range(1, len(cell.room)):
        if crowded(cell, rule, w):
            found = reliefs(cell, requests, rule, step, w, choices)
            if len(found):
                pair = found[choose(play, found, arrived, step, w, RELIEFS)]
                tokens += give(cell, requests, rule, step, -1, w, pair)
                moves += 1
    m, moved = drain_or_not(play, arrived, step, choices)
    return np.array([moves + m, tokens + moved, overflows], np.float64)


@numba.njit(cache=True)
def run(play, samples):
    """A trace up to the last sample; `samples`: int64, steps. `play.cell` must be empty.

    Returns the GPUs in use, int64 [samples], and float64 [steps, 3] of what `act` says.
    """
    cell, requests, rule, search = play.cell, play.requests, play.rule, play.search
    first, arrived, sampled = requests.arrival[0], 0, 0
    gpus, done = np.zeros(len(samples), np.int64), np.zeros((samples[-1] - first + 1, 3))
    for step in range(first, samples[-1] + 1):
        choices = search.choices if step >= search.first else 1
        pass_time(cell, requests, rule, step)
        while arrived < len(requests.arrival) and requests.arrival[arrived] <= step:
            found = places(cell, rule, size_of(arrived, requests, step), choices)
            arrived += 1
            pair = found[choose(play, found, arrived, step, 0, ARRIVALS)]
            give(cell, requests, rule, step, arrived - 1, 0, pair)
        if is_round(step, requests, rule):
            done[step - first] = act(play, arrived, step, choices)
        while sampled < len(samples) and samples[sampled] == step:
            gpus[sampled] = np.sum(cell.number > 0)
            sampled += 1
    return gpus, done
