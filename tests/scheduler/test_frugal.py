"""Frugal on random clusters: its proposals can be carried out, and its moves come to an end."""

from dataclasses import replace

import numpy as np
import pytest

from mellmpi.scheduler import MoveProposal, WorkerState
from mellmpi.scheduler.policies import POLICIES
from mellmpi.scheduler.policies.frugal.draining import CLUSTER_OVERFLOW_S, MAX_FAILURES
from mellmpi.scheduler.policies.frugal.forecast import (
    MOVE_PRICE,
    SHORT_ANSWER_S,
    growth_Bps,
    move_price,
    request_end_rate,
)
from mellmpi.scheduler.view import Drain
from tests.scheduler.views import view

FRUGAL = POLICIES["frugal"]


def cluster(seed):
    """Eight workers of 20 blocks, some crowded, some almost empty, some not active."""
    rng = np.random.default_rng(seed)
    sizes = [rng.integers(1, 9, rng.integers(0, 6)).tolist() for _ in range(8)]
    sizes = [s if sum(s) <= 20 else s[:2] for s in sizes]
    v = view(*sizes)
    states = rng.choice([WorkerState.ACTIVE] * 5 + [WorkerState.DRAINING, WorkerState.PARKED], 8)
    for w, state in enumerate(states.tolist(), start=1):
        if state == WorkerState.DRAINING or not sizes[w - 1]:
            v.workers.enter(w, WorkerState(state))
    v.token_rate, v.period_s, v.thrift = float(rng.uniform(0, 8)), 0.2, float(rng.uniform())
    v.cost = replace(v.cost, wake_s=float(rng.choice([0.0, 1.0])))
    v.requests.movable &= rng.random(len(v.requests.live)) < 0.95
    return v


def carry_out(v, proposals):
    """Carry out feasible proposals in order, as the scheduler does; return the moves made."""
    done = []
    for proposal in proposals:
        match proposal:
            case Drain(worker):
                v.workers.enter(worker, WorkerState.DRAINING)
            case MoveProposal(request_id, dst):
                row = int(
                    np.flatnonzero(v.requests.live & (v.requests.request_id == request_id))[0]
                )
                need, src = v.requests.need(row), int(v.requests.worker[row])
                if v.workers.state[dst] == WorkerState.ACTIVE and v.workers.budget[dst] >= need:
                    v.workers.free[dst] -= need
                    v.workers.free[src] += need
                    v.workers.num_requests[[src, dst]] += (-1, 1)
                    v.requests.worker[row] = dst
                    done.append(proposal)
    return done


@pytest.mark.parametrize("seed", range(60))
def test_every_move_fits_on_its_active_destination(seed):
    v = cluster(seed)
    proposals = FRUGAL.rebalance(v)
    room, slots = v.workers.budget.copy(), v.workers.max_requests - v.workers.num_requests
    moved = [p for p in proposals if isinstance(p, MoveProposal)]
    drained = {p.worker for p in proposals if isinstance(p, Drain)}
    assert len({m.request_id for m in moved}) == len(moved)
    for move in moved:
        row = int(np.flatnonzero(v.requests.request_id == move.request_id)[0])
        room[move.dst] -= v.requests.need(row)
        slots[move.dst] -= 1
        assert room[move.dst] >= 0 and slots[move.dst] >= 0
        assert v.workers.state[move.dst] == WorkerState.ACTIVE and move.dst not in drained
        assert v.requests.worker[row] != move.dst and v.requests.movable[row]


@pytest.mark.parametrize("seed", range(60))
def test_without_load_changes_the_moves_end(seed):
    v = cluster(seed)
    v.requests.movable[:] = v.requests.live
    rounds = [carry_out(v, FRUGAL.rebalance(v)) for _ in range(12)]
    assert not rounds[-1] and not rounds[-2]
    moves = [move.request_id for moves in rounds for move in moves]
    assert all(moves.count(request_id) <= 3 for request_id in moves)


@pytest.mark.parametrize("seed", range(60))
def test_a_request_is_placed_on_an_active_worker_with_room(seed):
    v = cluster(seed)
    waiting = int(np.flatnonzero(~v.requests.live)[0])
    v.requests.num_tokens[waiting], v.requests.block_size[waiting] = 12, 4
    v.requests.block_bytes[waiting] = 10
    if (worker := FRUGAL.place(v, waiting, "m")) is not None:
        assert v.hosting("m")[worker] and v.workers.budget[worker] >= 30


def test_a_placement_leaves_time_for_a_relief_at_any_thrift():
    v = view([17], [], growth=10.0, states={2: WorkerState.PARKED})
    v.cost, v.thrift, v.period_s = replace(v.cost, wake_s=0.0), 1.0, 1.0
    row = int(np.flatnonzero(~v.requests.live)[0])
    v.requests.num_tokens[row], v.requests.block_size[row], v.requests.block_bytes[row] = 1, 4, 10
    assert FRUGAL.place(v, row, "m") is None  # 10 bytes would be left, 1.2 rounds need 12
    v.period_s = 0.8
    assert FRUGAL.place(v, row, "m") == 1


def test_two_reliefs_do_not_use_the_same_last_slot():
    v = view([7, 12], [7, 12], [2])
    v.growth_Bps[[1, 2]], v.workers.max_requests[3] = 40.0, 2
    assert [p.dst for p in FRUGAL.rebalance(v) if isinstance(p, MoveProposal)] == [3]


def test_a_worker_with_a_request_waiting_to_resume_receives_nothing():
    v = view([7, 12], [9], [2])
    v.growth_Bps[1], v.workers.num_returning[2] = 40.0, 1
    assert {p.dst for p in FRUGAL.rebalance(v) if isinstance(p, MoveProposal)} == {3}


def test_the_source_of_a_relief_is_neither_destination_nor_drained_in_the_same_round():
    for seed in range(60):
        v = cluster(seed)
        worker = v.requests.worker.copy()
        proposals = FRUGAL.rebalance(v)
        rows = {int(i): r for r, i in enumerate(v.requests.request_id) if v.requests.live[r]}
        sources = {
            int(worker[rows[p.request_id]])
            for p in proposals
            if isinstance(p, MoveProposal) and p.reason == "overflow"
        }
        assert not sources & {p.dst for p in proposals if isinstance(p, MoveProposal)}
        assert not sources & {p.worker for p in proposals if isinstance(p, Drain)}


def test_the_cluster_keeps_its_time_to_overflow_when_several_workers_are_drained():
    v = view(*[[3]] * 7, growth=10.0)
    v.thrift = 1.0
    drained = [p.worker for p in FRUGAL.rebalance(v) if isinstance(p, Drain)]
    spare = 200 * (7 - len(drained)) - 7 * (30 + 5)
    assert spare >= 70 * (CLUSTER_OVERFLOW_S / 4 + 2 * v.cost.wake_s) > spare - 200  # 70 B/s


def test_after_a_failed_drain_the_next_worker_is_tried_only_with_room_to_spare():
    def emptied(others, thrift=0.5):
        v = view([9], [5, 5], *[[6, 6]] * others)  # the request of worker 1 fits nowhere
        v.cost, v.thrift = replace(v.cost, wake_s=0.0), thrift
        return [p.worker for p in FRUGAL.rebalance(v) if isinstance(p, Drain)]

    # 405 and 335 bytes are free; 200 + EXTRA_WORKERS · 200 are needed, the latter scaled by thrift
    assert emptied(3) == [2] and emptied(2) == []
    assert emptied(3, thrift=0.3) == [] and emptied(2, thrift=0.7) == [2]


def test_draining_stops_after_max_failures():
    def emptied(stuck):
        v = view(*[[1]] * stuck, [5, 5], *[[6, 6]] * 4)
        v.cost, v.thrift = replace(v.cost, wake_s=0.0), 1.0
        v.requests.movable[v.requests.worker <= stuck] = False
        return [p.worker for p in FRUGAL.rebalance(v) if isinstance(p, Drain)]

    assert emptied(MAX_FAILURES - 1) and not emptied(MAX_FAILURES)


def test_short_answers_raise_the_price_of_a_move():
    v = view([1], answer_tokens=100.0)
    v.token_rate = 1e-9
    long = move_price(v, 1)
    v.token_rate = 100.0 / SHORT_ANSWER_S
    assert move_price(v, 1) == pytest.approx(2 * long) and long == pytest.approx(MOVE_PRICE / 200)
    v.token_rate = 0.0
    assert move_price(v, 1) == pytest.approx(long)


def test_growth_follows_the_current_requests_once_the_token_rate_is_known():
    v = view([1, 1, 1], [], growth=10.0)
    assert growth_Bps(v).tolist() == [0, 10, 10]
    v.token_rate = 2.0  # a token is 2.5 bytes
    assert growth_Bps(v).tolist() == [0, 15, 0]


def test_longer_answers_lower_the_end_rate():
    v = view([1], answer_tokens=100.0)
    v.token_rate = 10.0
    before = request_end_rate(v)
    v.lengths.add(1000)
    assert request_end_rate(v) == pytest.approx(before / 10)
