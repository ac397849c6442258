"""Policies, each a function of a view. A block is 4 positions or 10 bytes; a worker has 20."""

from dataclasses import replace

import pytest

from mellmpi.protocol import ModelKv
from mellmpi.scheduler import MoveProposal, WorkerState
from mellmpi.scheduler.policies import POLICIES, Policy, policy_for
from mellmpi.scheduler.policies.frugal.forecast import growth_Bps, half_block
from mellmpi.scheduler.policies.stress import MOVES_A_TICK
from mellmpi.scheduler.view import Drain, ParkWorker, WakeWorker
from tests.scheduler.stage import KV, request
from tests.scheduler.views import view

ACTIVE, DRAINING, PARKED = WorkerState.ACTIVE, WorkerState.DRAINING, WorkerState.PARKED
PARKING, WAKING, LOST = WorkerState.PARKING, WorkerState.WAKING, WorkerState.LOST


def place(policy, view, blocks=1, model="m"):
    row = view.requests.add(request(99, num_prompt=4 * blocks), 0.0, KV)
    found = POLICIES[policy].place(view, row, model)
    view.requests.drop(row)
    return found


def rebalance(view, policy="frugal"):
    return POLICIES[policy].rebalance(view)


# --- placement -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "worker"), [("best_fit", 3), ("worst_fit", 2), ("frugal", 3)])
def test_best_fit_and_frugal_take_the_fullest_worst_fit_the_emptiest(policy, worker):
    assert place(policy, view([5], [2], [9])) == worker


@pytest.mark.parametrize("policy", POLICIES)
def test_the_lowest_id_breaks_ties(policy):
    assert place(policy, view([5], [5], [5])) == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_with_no_room_there_is_no_place(policy):
    assert place(policy, view([18], [18]), blocks=3) is None
    assert place(policy, view([18], [14]), blocks=3) == 2


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("state", [DRAINING, PARKING, PARKED, WAKING, LOST])
def test_only_active_workers_take_requests(policy, state):
    assert place(policy, view([], [], states={1: state})) == 2
    assert place(policy, view([], states={1: state})) is None


@pytest.mark.parametrize("policy", POLICIES)
def test_only_workers_of_the_model_take_a_request(policy):
    v = view([], [])
    v.workers.ready(2, (ModelKv("other", 4, 10),), 200, 8, acked=0)
    assert place(policy, v, model="other") == 2 and place(policy, v, model="third") is None


@pytest.mark.parametrize("policy", POLICIES)
def test_a_worker_with_all_seats_taken_takes_no_request(policy):
    assert place(policy, view([1] * 8, [])) == 2


def test_what_was_ordered_counts_as_spent():
    v = view([10], [9])
    v.workers.order(2, 50)
    assert place("best_fit", v, blocks=4) == 2 and place("worst_fit", v, blocks=4) == 1


def test_frugal_keeps_room_for_a_horizon_of_growth():
    # 10 B/s for 0.5 s and the 2 s of waking, and half a block each: 35 bytes are to stay free.
    assert place("frugal", view([15], [16], growth=10.0)) == 1
    assert place("frugal", view([16], [15], growth=10.0)) == 2


def test_frugal_keeps_half_a_block_a_request_until_rates_are_known():
    assert half_block(view([1, 1, 1], [])).tolist() == [0, 5, 5]
    assert growth_Bps(view([1, 1, 1], [], growth=10.0)).tolist() == [0, 10, 10]


def test_frugal_lets_the_queue_wait_rather_than_crowd():
    crowded = [15], [18]
    assert place("frugal", view(*crowded, growth=10.0)) == 1
    for state in (DRAINING, PARKING, PARKED, WAKING, LOST):
        assert place("frugal", view([18], [18], [], growth=10.0, states={3: state})) is None


def test_frugal_keeps_half_an_answer_a_request_where_no_worker_can_come():
    assert place("frugal", view([8], [9], answer_tokens=80.0)) is not None
    assert place("frugal", view([11], [11], answer_tokens=80.0)) is None
    assert place("frugal", view([11], [11], [], answer_tokens=80.0, states={3: PARKED})) == 1
    assert place("frugal", view([11], [11], [], answer_tokens=80.0, states={3: LOST})) is None


def test_frugal_uses_an_empty_worker_however_little_room_to_grow_it_has():
    assert place("frugal", view([], [], growth=150.0, states={2: PARKED}), blocks=19) == 1


# --- parking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_workers_empty_for_long_enough_are_parked_but_never_the_last_one(policy):
    assert rebalance(view([9], [], []), policy) == [ParkWorker(3), ParkWorker(2)]
    assert rebalance(view([], [], []), policy) == [ParkWorker(3), ParkWorker(2)]
    assert rebalance(view([]), policy) == []
    assert rebalance(view([], [], states={2: PARKED}), policy) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_a_worker_empty_for_a_moment_or_needed_by_the_queue_is_not_parked(policy):
    assert rebalance(view([9], [], now=0.9), policy) == []
    assert rebalance(view([9], [], now=1.0), policy) == [ParkWorker(2)]
    assert rebalance(view([9], [], waiting=1), policy) == []


def test_frugal_parks_nothing_that_a_crowded_worker_may_need():
    # In 2 s, while one could be woken, it grows by 60 bytes or by 10; it has 10 of whole blocks.
    assert rebalance(view([16, 2], [], growth=30.0)) == []
    assert rebalance(view([16, 2], [], growth=2.0)) == [ParkWorker(2)]


def test_the_rate_of_a_worker_that_is_parked_now_keeps_nobody_from_parking():
    v = view([5], [], [], states={3: PARKED})
    v.growth_Bps[3] = 50.0
    assert rebalance(v) == [ParkWorker(2)]


# --- moves ---------------------------------------------------------------------------------------


def test_frugal_relieves_what_is_about_to_overflow_of_the_request_that_helps_most_for_its_bytes():
    v = view([2, 6, 4, 7], [5])
    v.growth_Bps[1] = 8.0  # the smallest one's room would be full again in a second
    assert rebalance(v) == [MoveProposal(2, 2, "overflow")]
    v.growth_Bps[1] = 4.0  # now less is enough
    assert rebalance(v) == [MoveProposal(3, 2, "overflow")]


def test_frugal_gives_a_relief_to_the_place_that_it_fits_most_tightly():
    v = view([12, 7], [7], [9], [11])
    v.growth_Bps[1:] = [80.0, 0.5, 0.5, 0.5]
    assert rebalance(v)[0] == MoveProposal(2, 4, "overflow")
    v.growth_Bps[4] = 5.0  # now there are but 2 s left
    assert rebalance(v)[0] == MoveProposal(2, 3, "overflow")


def test_frugal_moves_the_largest_when_none_is_enough():
    v = view([2, 2, 3, 2, 3, 3, 2, 2], [5])
    v.growth_Bps[1] = 50.0
    assert rebalance(v) == [MoveProposal(3, 2, "overflow")]


def test_a_request_alone_on_its_worker_is_left_there():
    v = view([17], [4])
    v.growth_Bps[1] = 50.0
    assert rebalance(v) == []


def test_a_worker_full_of_what_has_yet_to_arrive_is_left_alone():
    v = view([], [5])
    v.workers.order(1, 190)
    v.workers.num_requests[1], v.growth_Bps[1] = 2, 50.0
    assert rebalance(v) == []


def test_frugal_does_not_relieve_twice():
    v = view([10, 9], [5], [])
    v.growth_Bps[1] = 40.0
    v.requests.movable[0] = False
    assert not [p for p in rebalance(v) if isinstance(p, MoveProposal)]


def test_two_that_overflow_do_not_take_the_same_room():
    v = view([7, 12], [7, 12], [6], [7])
    v.growth_Bps[[1, 2]] = 40.0
    assert rebalance(v) == [MoveProposal(1, 4, "overflow"), MoveProposal(3, 3, "overflow")]


def test_a_crowded_worker_is_no_help_to_another():
    v = view([7, 12], [7, 12])
    v.growth_Bps[:] = 40.0
    assert rebalance(v) == []


def test_seats_are_room_too():
    v = view([7, 12], [1] * 8, [1])
    v.growth_Bps[1] = 40.0
    assert rebalance(v) == [MoveProposal(1, 3, "overflow")]


def crowd(**states):
    v = view([7, 12], [7, 12], [], [], states=states.get("states"))
    v.growth_Bps[:] = 40.0
    return v


def test_with_nowhere_to_go_a_draining_worker_is_kept_or_else_a_parked_one_woken():
    assert rebalance(crowd(states={3: PARKED, 4: PARKED})) == [WakeWorker(3)]
    assert rebalance(crowd(states={3: PARKED, 4: DRAINING})) == [WakeWorker(4)]


def test_only_a_worker_that_runs_one_of_its_models_is_kept_or_woken_for_it():
    v = crowd(states={3: DRAINING, 4: PARKED})
    v.workers.runs[:, 3] = False
    assert rebalance(v) == [WakeWorker(4)]
    v.workers.enter(3, WorkerState.ACTIVE)
    assert rebalance(v) == [WakeWorker(4)], "an empty one of another model is no help"


def test_one_worker_is_woken_at_a_time():
    assert rebalance(crowd(states={3: PARKED, 4: WAKING})) == []


# --- draining ------------------------------------------------------------------------------------


def test_frugal_empties_the_worker_that_holds_least_when_its_requests_fit_elsewhere():
    v = view([10], [3, 2], [9])
    assert rebalance(v) == [Drain(2), MoveProposal(2, 1, "drain"), MoveProposal(3, 1, "drain")]


def test_frugal_empties_no_worker_without_room_to_grow_until_another_could_be_woken():
    # Both grow by 10 B/s, for 1.5 s and twice the 2 s of waking: 110 bytes are to stay free.
    assert rebalance(view([6], [2], growth=10.0)) != []
    assert rebalance(view([7], [2], growth=10.0)) == []


def test_thrift_keeps_less_room_and_empties_more():
    v = view([14], [2], growth=16.0)
    v.cost = replace(v.cost, wake_s=0.0)
    v.thrift = 0.0
    assert rebalance(v) == []
    v.thrift = 1.0
    assert rebalance(v) == [Drain(2), MoveProposal(2, 1, "drain")]


def test_frugal_empties_a_worker_wholly_or_not_at_all():
    assert rebalance(view([16], [3, 2])) == []
    assert rebalance(view([1] * 7, [1, 1])) == []  # there is one seat


def test_frugal_empties_none_while_one_is_being_emptied_or_something_waits_or_leaves_it():
    assert rebalance(view([10], [2], waiting=1)) == []
    assert rebalance(view([10], [2], [2], states={3: DRAINING})) == [MoveProposal(3, 1, "drain")]
    v = view([19], [2])
    v.requests.movable[1] = False
    assert rebalance(v) == []


def test_frugal_empties_several_workers_at_once_and_none_that_is_to_receive():
    v = view([3], [2], [10], [1])
    moves = [MoveProposal(4, 3, "drain"), MoveProposal(2, 3, "drain"), MoveProposal(1, 3, "drain")]
    assert rebalance(v) == [Drain(4), moves[0], Drain(2), moves[1], Drain(1), moves[2]]
    assert rebalance(view([2], [3])) == [Drain(1), MoveProposal(1, 2, "drain")]


def test_what_was_promised_to_one_worker_being_emptied_is_not_promised_to_the_next():
    assert rebalance(view([4], [3], [15])) == [Drain(2), MoveProposal(2, 3, "drain")]


def test_while_a_worker_cannot_be_emptied_further_no_other_is():
    assert rebalance(view([10], [2], [19], states={3: DRAINING})) == []


def test_an_empty_worker_that_is_not_ripe_for_parking_does_not_keep_others_from_being_emptied():
    assert rebalance(view([10], [2], [], now=0.0)) == [Drain(2), MoveProposal(2, 1, "drain")]


def test_as_many_seats_as_are_left_are_used():
    moves = [MoveProposal(7, 1, "drain"), MoveProposal(8, 1, "drain")]
    assert rebalance(view([2] * 6, [1, 1])) == [Drain(2), *moves]


def test_a_worker_being_emptied_gives_away_what_fits_and_does_not_move():
    v = view([15], [3, 4], states={2: DRAINING})
    assert rebalance(v) == [MoveProposal(2, 1, "drain")]
    v.requests.movable[1] = False
    assert rebalance(v) == [MoveProposal(3, 1, "drain")]


def test_the_only_busy_worker_is_not_emptied_into_an_empty_one():
    assert rebalance(view([5])) == []
    assert rebalance(view([5], [], now=0.0)) == []
    assert rebalance(view([5], [], states={2: PARKED})) == []


# --- the others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["best_fit", "worst_fit"])
def test_best_fit_and_worst_fit_move_nothing(policy):
    assert rebalance(view([19, 1], [1], growth=50.0), policy) == []


def test_never_means_that_nothing_moves_but_workers_still_park():
    never = policy_for("frugal", "never")
    assert never.place is POLICIES["frugal"].place
    assert never.rebalance(view([10], [2])) == []
    assert never.rebalance(view([10], [])) == [ParkWorker(2)]


def test_auto_is_the_policy_itself_and_an_unknown_one_is_refused():
    assert policy_for("best_fit", "auto") is POLICIES["best_fit"]
    with pytest.raises(ValueError, match="--policy must be one of best_fit, worst_fit"):
        policy_for("worst", "auto")


def stress(seed=0, tick=1, **kwargs):
    policy = policy_for("worst_fit", "stress")
    assert isinstance(policy, Policy) and policy.place is POLICIES["worst_fit"].place
    return policy.rebalance(view([1] * 5, [1] * 5, [1] * 5, seed=seed, tick=tick, **kwargs))


def test_stress_moves_requests_to_other_active_workers_by_all_modes():
    moves = [m for tick in range(50) for m in stress(tick=tick, states={3: PARKED})]
    assert len(moves) == 50 * MOVES_A_TICK and {m.mode for m in moves} == {
        "transfer",
        "recompute",
        "split",
    }
    assert {(m.dst, (m.request_id - 1) // 5 + 1) for m in moves} == {(1, 2), (2, 1), (1, 3), (2, 3)}


def test_stress_depends_on_seed_and_tick_alone():
    assert stress() == stress() != stress(seed=1) != stress(tick=2) != stress()


def test_stress_moves_only_what_can_move_and_needs_two_workers():
    policy = policy_for("worst_fit", "stress")
    assert policy.rebalance(view([1, 1])) == []
    v = view([1, 1], [1])
    v.requests.movable[:] = False
    assert policy.rebalance(v) == []
    v.requests.movable[1] = True
    assert {move.request_id for move in policy.rebalance(v)} == {2}
