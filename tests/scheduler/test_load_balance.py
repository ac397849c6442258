"""Load balance: each move reduces the difference between a crowded and a free worker."""

import numpy as np
import pytest

from mellmpi.scheduler import MoveProposal
from mellmpi.scheduler.policies import POLICIES
from mellmpi.scheduler.policies.load_balance import freeness
from tests.scheduler.views import view

SEEDS = range(60)


def random_view(seed):
    """Workers of 20 blocks, filled at random; half of them have lost nine tenths of their room."""
    rng = np.random.default_rng(seed)
    workers = []
    for _ in range(int(rng.integers(2, 7))):
        sizes = rng.integers(1, 6, int(rng.integers(0, 9))).tolist()
        while sum(sizes) > 20:
            sizes.pop()
        workers.append(sizes)
    v = view(*workers)
    v.workers.token_bytes[:] = 0.02  # a free block is 500 steps of one request
    v.workers.free[1:] -= v.workers.free[1:] * 9 // 10 * rng.integers(0, 2, len(workers))
    return v


def steps(v):
    ledger = v.workers
    return freeness(ledger.budget, ledger.num_requests, ledger.token_bytes)


def enact(v, move):
    """Make the move at once; return its source."""
    row = int(np.flatnonzero(v.requests.request_id == move.request_id)[0])
    src, size = int(v.requests.worker[row]), v.requests.need(row)
    v.workers.free[src] += size
    v.workers.free[move.dst] -= size
    v.workers.remove(src, v.now)
    v.workers.add(move.dst)
    v.requests.worker[row] = move.dst
    return src


def moves(v):
    return [p for p in POLICIES["load_balance"].rebalance(v) if isinstance(p, MoveProposal)]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_move_widens_the_gap_or_goes_where_it_does_not_fit(seed):
    v = random_view(seed)
    for move in moves(v):
        before = steps(v)
        src = enact(v, move)
        after = steps(v)
        assert v.workers.budget[move.dst] >= 0
        assert 0 <= after[move.dst] - after[src] < before[move.dst] - before[src]


@pytest.mark.parametrize("seed", SEEDS)
def test_moves_are_deterministic_and_come_to_an_end(seed):
    assert moves(random_view(seed)) == moves(random_view(seed))
    v = random_view(seed)
    for _ in range(100):
        if not (found := moves(v)):
            return
        for move in found:
            enact(v, move)
    raise AssertionError("requests move back and forth")


def test_some_requests_move():
    assert sum(len(moves(random_view(seed))) for seed in SEEDS) > 10


def test_a_balanced_cluster_is_left_alone():
    assert moves(view([9, 9], [9, 9])) == []
