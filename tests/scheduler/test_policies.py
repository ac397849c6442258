"""Policies as functions of a view. A block has 4 positions, 10 bytes; a worker has 20 blocks."""

import pytest

from mellmpi.protocol import ModelKv
from mellmpi.scheduler import WorkerState
from mellmpi.scheduler.policies import POLICIES, Policy, policy_for
from mellmpi.scheduler.policies.frugal.forecast import growth_Bps, half_block
from mellmpi.scheduler.policies.stress import MOVES_PER_ROUND
from mellmpi.scheduler.view import ParkWorker
from tests.scheduler.stage import KV, request
from tests.scheduler.views import view

ACTIVE, DRAINING, PARKED = WorkerState.ACTIVE, WorkerState.DRAINING, WorkerState.PARKED
PARKING, WAKING, LOST = WorkerState.PARKING, WorkerState.WAKING, WorkerState.LOST


def place(policy, view, blocks=1, model="m"):
    row = view.requests.add(request(99, num_prompt=4 * blocks), KV)
    found = POLICIES[policy].place(view, row, model)
    view.requests.drop(row)
    return found


def rebalance(view, policy="frugal"):
    return POLICIES[policy].rebalance(view)


# --- placement -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "worker"), [("best_fit", 3), ("worst_fit", 2), ("frugal", 3)])
def test_best_fit_and_frugal_choose_the_fullest_worker_worst_fit_the_emptiest(policy, worker):
    assert place(policy, view([5], [2], [9])) == worker


@pytest.mark.parametrize("policy", POLICIES)
def test_the_lowest_id_breaks_ties(policy):
    assert place(policy, view([5], [5], [5])) == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_without_room_there_is_no_placement(policy):
    assert place(policy, view([18], [18]), blocks=3) is None
    assert place(policy, view([18], [14]), blocks=3) == 2


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("state", [DRAINING, PARKING, PARKED, WAKING, LOST])
def test_only_active_workers_take_requests(policy, state):
    assert place(policy, view([], [], states={1: state})) == 2
    assert place(policy, view([], states={1: state})) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_only_workers_that_run_the_model_take_its_requests(policy):
    v = view([], [])
    v.workers.ready(2, (ModelKv("other", 4, 10),), 200, 8, acked=0)
    assert place(policy, v, model="other") == 2 and place(policy, v, model="third") is None


@pytest.mark.parametrize("policy", POLICIES)
def test_a_worker_with_max_requests_takes_no_further_one(policy):
    assert place(policy, view([1] * 8, [])) == 2


def test_ordered_bytes_count_as_used():
    v = view([10], [9])
    v.workers.order(2, 50)
    assert place("best_fit", v, blocks=4) == 2 and place("worst_fit", v, blocks=4) == 1


def test_frugal_keeps_room_to_grow_until_another_worker_is_awake():
    # 10 B/s for 0.5 s and the 2 s of waking, and half a block for each: 35 bytes must stay free.
    assert place("frugal", view([15], [16], growth=10.0)) == 1
    assert place("frugal", view([16], [15], growth=10.0)) == 2


def test_frugal_reserves_half_a_block_for_each_request():
    assert half_block(view([1, 1, 1], [])).tolist() == [0, 5, 5]
    assert growth_Bps(view([1, 1, 1], [], growth=10.0)).tolist() == [0, 10, 10]


def test_frugal_lets_the_queue_wait_rather_than_fill_a_worker_that_cannot_be_relieved():
    crowded = [15], [18]
    assert place("frugal", view(*crowded, growth=10.0)) == 1
    for state in (DRAINING, PARKING, PARKED, WAKING, LOST):
        assert place("frugal", view([18], [18], [], growth=10.0, states={3: state})) is None


def test_frugal_keeps_half_an_answer_for_each_request_where_no_worker_can_be_woken():
    assert place("frugal", view([8], [9], answer_tokens=80.0)) is not None
    assert place("frugal", view([11], [11], answer_tokens=80.0)) is None
    assert place("frugal", view([11], [11], [], answer_tokens=80.0, states={3: PARKED})) == 1
    assert place("frugal", view([11], [11], [], answer_tokens=80.0, states={3: LOST})) is None


def test_frugal_uses_an_empty_worker_even_without_room_to_grow():
    assert place("frugal", view([], [], growth=150.0, states={2: PARKED}), blocks=19) == 1


# --- parking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_workers_empty_for_long_enough_are_parked_but_never_the_last_one(policy):
    assert rebalance(view([9], [], []), policy) == [ParkWorker(3), ParkWorker(2)]
    assert rebalance(view([], [], []), policy) == [ParkWorker(3), ParkWorker(2)]
    assert rebalance(view([]), policy) == []
    assert rebalance(view([], [], states={2: PARKED}), policy) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_a_worker_emptied_just_now_or_needed_by_the_queue_is_not_parked(policy):
    assert rebalance(view([9], [], now=0.9), policy) == []
    assert rebalance(view([9], [], now=1.0), policy) == [ParkWorker(2)]
    assert rebalance(view([9], [], waiting=1), policy) == []


def test_frugal_parks_no_worker_that_a_crowded_one_may_need():
    # While another is woken, 2 s, worker 1 grows by 60 or by 4 bytes; 10 are free for it.
    assert rebalance(view([16, 2], [], growth=30.0)) == []
    assert rebalance(view([16, 2], [], growth=2.0)) == [ParkWorker(2)]


def test_the_measured_growth_of_a_parked_worker_does_not_prevent_parking():
    v = view([5], [], [], states={3: PARKED})
    v.growth_Bps[3] = 50.0
    assert rebalance(v) == [ParkWorker(2)]


# --- other policies ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["best_fit", "worst_fit"])
def test_best_fit_and_worst_fit_move_nothing(policy):
    assert rebalance(view([19, 1], [1], growth=50.0), policy) == []


def test_without_migrations_empty_workers_still_park():
    never = policy_for("frugal", "never")
    assert never.place is POLICIES["frugal"].place
    assert never.rebalance(view([10], [2])) == []
    assert never.rebalance(view([10], [])) == [ParkWorker(2)]


def test_auto_is_the_policy_itself_and_an_unknown_name_is_refused():
    assert policy_for("best_fit", "auto") is POLICIES["best_fit"]
    with pytest.raises(ValueError, match="--policy must be one of best_fit, worst_fit"):
        policy_for("worst", "auto")


def stress(seed=0, tick=1, **kwargs):
    policy = policy_for("worst_fit", "stress")
    assert isinstance(policy, Policy) and policy.place is POLICIES["worst_fit"].place
    return policy.rebalance(view([1] * 5, [1] * 5, [1] * 5, seed=seed, tick=tick, **kwargs))


def test_stress_moves_requests_to_other_active_workers_by_all_modes():
    moves = [m for tick in range(50) for m in stress(tick=tick, states={3: PARKED})]
    assert len(moves) == 50 * MOVES_PER_ROUND and {m.mode for m in moves} == {
        "transfer",
        "recompute",
        "split",
    }
    assert {(m.dst, (m.request_id - 1) // 5 + 1) for m in moves} == {(1, 2), (2, 1), (1, 3), (2, 3)}


def test_stress_depends_on_seed_and_tick_alone():
    assert stress() == stress() != stress(seed=1) != stress(tick=2) != stress()


def test_stress_moves_only_movable_requests_and_needs_two_workers():
    policy = policy_for("worst_fit", "stress")
    assert policy.rebalance(view([1, 1])) == []
    v = view([1, 1], [1])
    v.requests.movable[:] = False
    assert policy.rebalance(v) == []
    v.requests.movable[1] = True
    assert {move.request_id for move in policy.rebalance(v)} == {2}
