"""A search that knows the future, around the rule of `frugal` (`clairvoyant_rule`).

At each decision it tries the rule's best choices: the true future is played up to a horizon with
the rule deciding, and the choice with the lowest cost is taken.
"""

from typing import NamedTuple

import numba
import numpy as np
from clairvoyant_rule import (
    ARRIVALS,
    NOTHING,
    RELIEFS,
    Cluster,
    Requests,
    Rule,
    advance,
    copy,
    drain,
    follow,
    is_crowded,
    is_round,
    move,
    placements,
    reliefs,
    size_of,
)


class Search(NamedTuple):
    first: int  # first step of the search; before it the rule decides
    choices: int  # tried at each decision; 1: the rule alone
    horizon: int  # steps
    gpu_moves: float  # cost of a GPU for a second, in moves


class Replay(NamedTuple):
    """State of a run; choices are tried in `trial`, which is overwritten."""

    requests: Requests
    rule: Rule
    search: Search
    cluster: Cluster
    trial: Cluster


@numba.njit(cache=True)
def cost(cluster, requests, rule, arrived, step, stage, search):
    """Moves, and GPU seconds at their price, up to the horizon with the rule deciding."""
    moves, busy_steps, until = 0, 0, step + search.horizon
    while step < until:
        arrived, more = follow(cluster, requests, rule, arrived, step, stage)
        moves, stage, began = moves + more, ARRIVALS, step
        step += 1
        due = requests.arrival[arrived] if arrived < len(requests.arrival) else until
        while step < min(due, until) and not is_round(step, requests, rule):
            step += 1
        busy_steps += np.sum(cluster.number > 0) * (step - began)
    return moves + search.gpu_moves * busy_steps / rule.rate


@numba.njit(cache=True)
def choose(replay, found, arrived, step, src, stage):
    """Index of the (index, destination) with the lowest cost; src 0: for the last arrival."""
    if len(found) == 1:
        return 0
    requests, rule, trial = replay.requests, replay.rule, replay.trial
    best, least = 0, np.inf
    for j in range(len(found)):
        copy(replay.cluster, trial)
        move(trial, requests, rule, step, arrived - 1, src, found[j])
        spent = cost(trial, requests, rule, arrived, step, stage, replay.search)
        if spent < least - 1e-9:
            best, least = j, spent
    return best


@numba.njit(cache=True)
def drain_if_cheaper(replay, arrived, step, choices):
    """Drain by the rule, unless not draining costs less; return (requests, tokens) moved."""
    cluster, trial, search = replay.cluster, replay.trial, replay.search
    requests, rule = replay.requests, replay.rule
    if choices > 1:
        copy(cluster, trial)
        moves = drain(trial, requests, rule, step)[0]
        if moves == 0:
            return 0, 0.0
        spent = moves + cost(trial, requests, rule, arrived, step, NOTHING, search)
        copy(cluster, trial)
        if spent >= cost(trial, requests, rule, arrived, step, NOTHING, search):
            return 0, 0.0
    return drain(cluster, requests, rule, step)


@numba.njit(cache=True)
def rebalance(replay, arrived, step, choices):
    """One round, reliefs before drains: [requests moved, their tokens, overfull workers]."""
    cluster, requests, rule = replay.cluster, replay.requests, replay.rule
    moves, tokens, overflows = 0, 0.0, np.sum(cluster.free < 0)
    for w in range(1, len(cluster.free)):
        if is_crowded(cluster, rule, w):
            found = reliefs(cluster, requests, rule, step, w, choices)
            if len(found):
                pair = found[choose(replay, found, arrived, step, w, RELIEFS)]
                tokens += move(cluster, requests, rule, step, -1, w, pair)
                moves += 1
    m, moved = drain_if_cheaper(replay, arrived, step, choices)
    return np.array([moves + m, tokens + moved, overflows], np.float64)


@numba.njit(cache=True)
def run(replay, samples):
    """Run a trace up to the last of `samples` (int64, steps), from an empty cluster.

    Returns the GPUs in use, int64 [samples], and float64 [steps, 3]: the results of `rebalance`.
    """
    cluster, requests, rule = replay.cluster, replay.requests, replay.rule
    first, arrived, sampled = requests.arrival[0], 0, 0
    gpus, done = np.zeros(len(samples), np.int64), np.zeros((samples[-1] - first + 1, 3))
    for step in range(first, samples[-1] + 1):
        choices = replay.search.choices if step >= replay.search.first else 1
        advance(cluster, requests, rule, step)
        while arrived < len(requests.arrival) and requests.arrival[arrived] <= step:
            found = placements(cluster, rule, size_of(arrived, requests, step), choices)
            arrived += 1
            pair = found[choose(replay, found, arrived, step, 0, ARRIVALS)]
            move(cluster, requests, rule, step, arrived - 1, 0, pair)
        if is_round(step, requests, rule):
            done[step - first] = rebalance(replay, arrived, step, choices)
        while sampled < len(samples) and samples[sampled] == step:
            gpus[sampled] = np.sum(cluster.number > 0)
            sampled += 1
    return gpus, done
