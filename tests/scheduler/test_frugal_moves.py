"""The moves of `frugal`: reliefs and drains. A block has 10 bytes; a worker has 20 blocks."""

from dataclasses import replace

from mellmpi.scheduler import MoveProposal, WorkerState
from mellmpi.scheduler.policies import POLICIES
from mellmpi.scheduler.view import Drain, WakeWorker
from tests.scheduler.views import view

DRAINING, PARKED, WAKING = WorkerState.DRAINING, WorkerState.PARKED, WorkerState.WAKING
rebalance = POLICIES["frugal"].rebalance


# --- reliefs -------------------------------------------------------------------------------------


def test_relieves_a_worker_of_the_request_that_lowers_the_cost_most():
    v = view([2, 6, 4, 7], [5])
    v.growth_Bps[1] = 8.0  # without the smallest request it would overflow a second later
    assert rebalance(v) == [MoveProposal(2, 2, "overflow")]
    v.growth_Bps[1] = 4.0  # a smaller request is enough
    assert rebalance(v) == [MoveProposal(3, 2, "overflow")]


def test_a_relief_goes_to_the_fullest_worker_that_keeps_enough_time():
    v = view([12, 7], [7], [9], [11])
    v.growth_Bps[1:] = [80.0, 0.5, 0.5, 0.5]
    assert rebalance(v)[0] == MoveProposal(2, 4, "overflow")
    v.growth_Bps[4] = 5.0  # it would overflow 2 s later
    assert rebalance(v)[0] == MoveProposal(2, 3, "overflow")


def test_moves_the_largest_request_when_none_is_enough():
    v = view([2, 2, 3, 2, 3, 3, 2, 2], [5])
    v.growth_Bps[1] = 50.0
    assert rebalance(v) == [MoveProposal(3, 2, "overflow")]


def test_a_request_alone_on_its_worker_stays():
    v = view([17], [4])
    v.growth_Bps[1] = 50.0
    assert rebalance(v) == []


def test_a_worker_filled_by_incoming_requests_is_not_relieved():
    v = view([], [5])
    v.workers.order(1, 190)
    v.workers.num_requests[1], v.growth_Bps[1] = 2, 50.0
    assert rebalance(v) == []


def test_a_worker_with_a_migrating_request_is_not_relieved_again():
    v = view([10, 9], [5], [])
    v.growth_Bps[1] = 40.0
    v.requests.movable[0] = False
    assert not [p for p in rebalance(v) if isinstance(p, MoveProposal)]


def test_two_reliefs_do_not_use_the_same_room():
    v = view([7, 12], [7, 12], [6], [7])
    v.growth_Bps[[1, 2]] = 40.0
    assert rebalance(v) == [MoveProposal(1, 4, "overflow"), MoveProposal(3, 3, "overflow")]


def test_a_crowded_worker_is_no_destination_for_another():
    v = view([7, 12], [7, 12])
    v.growth_Bps[:] = 40.0
    assert rebalance(v) == []


def test_a_worker_with_max_requests_is_no_destination():
    v = view([7, 12], [1] * 8, [1])
    v.growth_Bps[1] = 40.0
    assert rebalance(v) == [MoveProposal(1, 3, "overflow")]


def crowd(**states):
    v = view([7, 12], [7, 12], [], [], states=states.get("states"))
    v.growth_Bps[:] = 40.0
    return v


def test_without_a_destination_a_draining_worker_is_reactivated_or_else_a_parked_one_woken():
    assert rebalance(crowd(states={3: PARKED, 4: PARKED})) == [WakeWorker(3)]
    assert rebalance(crowd(states={3: PARKED, 4: DRAINING})) == [WakeWorker(4)]


def test_only_a_worker_that_runs_a_model_of_the_crowded_one_is_activated():
    v = crowd(states={3: DRAINING, 4: PARKED})
    v.workers.runs[:, 3] = False
    assert rebalance(v) == [WakeWorker(4)]
    v.workers.enter(3, WorkerState.ACTIVE)
    assert rebalance(v) == [WakeWorker(4)], "an empty worker of another model does not help"


def test_only_one_worker_is_woken_at_a_time():
    assert rebalance(crowd(states={3: PARKED, 4: WAKING})) == []


# --- draining ------------------------------------------------------------------------------------


def test_the_worker_that_holds_least_is_drained_when_its_requests_fit_elsewhere():
    v = view([10], [3, 2], [9])
    assert rebalance(v) == [Drain(2), MoveProposal(2, 1, "drain"), MoveProposal(3, 1, "drain")]


def test_no_worker_is_drained_unless_the_others_keep_time_for_two_wakes():
    # Both grow by 10 B/s, for 1.5 s and twice the 2 s of waking: 110 bytes must stay free.
    assert rebalance(view([6], [2], growth=10.0)) != []
    assert rebalance(view([7], [2], growth=10.0)) == []


def test_a_higher_thrift_keeps_less_room_and_drains_more():
    v = view([14], [2], growth=16.0)
    v.cost = replace(v.cost, wake_s=0.0)
    v.thrift = 0.0
    assert rebalance(v) == []
    v.thrift = 1.0
    assert rebalance(v) == [Drain(2), MoveProposal(2, 1, "drain")]


def test_a_worker_is_drained_of_all_requests_or_of_none():
    assert rebalance(view([16], [3, 2])) == []
    assert rebalance(view([1] * 7, [1, 1])) == []  # worker 1 can take one more request


def test_no_worker_is_drained_while_one_is_draining_or_a_request_waits_or_migrates():
    assert rebalance(view([10], [2], waiting=1)) == []
    assert rebalance(view([10], [2], [2], states={3: DRAINING})) == [MoveProposal(3, 1, "drain")]
    v = view([19], [2])
    v.requests.movable[1] = False
    assert rebalance(v) == []


def test_several_workers_are_drained_at_once_but_no_destination_of_a_move():
    v = view([3], [2], [10], [1])
    moves = [MoveProposal(4, 3, "drain"), MoveProposal(2, 3, "drain"), MoveProposal(1, 3, "drain")]
    assert rebalance(v) == [Drain(4), moves[0], Drain(2), moves[1], Drain(1), moves[2]]
    assert rebalance(view([2], [3])) == [Drain(1), MoveProposal(1, 2, "drain")]


def test_two_drains_do_not_use_the_same_room():
    assert rebalance(view([4], [3], [15])) == [Drain(2), MoveProposal(2, 3, "drain")]


def test_while_a_draining_worker_cannot_move_its_requests_no_other_is_drained():
    assert rebalance(view([10], [2], [19], states={3: DRAINING})) == []


def test_an_empty_worker_not_yet_parked_does_not_prevent_drains():
    assert rebalance(view([10], [2], [], now=0.0)) == [Drain(2), MoveProposal(2, 1, "drain")]


def test_a_drain_uses_all_requests_that_a_destination_may_still_take():
    moves = [MoveProposal(7, 1, "drain"), MoveProposal(8, 1, "drain")]
    assert rebalance(view([2] * 6, [1, 1])) == [Drain(2), *moves]


def test_a_draining_worker_moves_the_requests_that_fit_and_do_not_migrate_already():
    v = view([15], [3, 4], states={2: DRAINING})
    assert rebalance(v) == [MoveProposal(2, 1, "drain")]
    v.requests.movable[1] = False
    assert rebalance(v) == [MoveProposal(3, 1, "drain")]


def test_the_only_busy_worker_is_not_drained_into_an_empty_one():
    assert rebalance(view([5])) == []
    assert rebalance(view([5], [], now=0.0)) == []
    assert rebalance(view([5], [], states={2: PARKED})) == []
