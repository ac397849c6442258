"""The cluster scheduler, apart from its transition table."""

from dataclasses import replace

import pytest

from mellmpi.costs import CostModel, Link
from mellmpi.costs.links import STALE_S
from mellmpi.protocol import (
    FRONT,
    OBSERVER,
    Assign,
    Cancel,
    Emit,
    KvFailed,
    KvRefused,
    KvReserved,
    LinksMeasured,
    MigrationEnded,
    MigrationStarted,
    ModelKv,
    Park,
    Parked,
    Preempted,
    ReceiveKv,
    Rejected,
    Request,
    Submit,
    Wake,
    WorkerChanged,
    WorkerLost,
    WorkerReady,
)
from mellmpi.scheduler import MoveProposal, WorkerState
from mellmpi.scheduler.requests import MAX_OWNER_DEATHS, State
from mellmpi.scheduler.view import Drain, ParkWorker, WakeWorker
from tests.scheduler.stage import (
    KV,
    Stage,
    assert_nothing_left,
    of_type,
    received,
    report,
    request,
    to_workers,
)


@pytest.fixture
def stage():
    return Stage()


# --- tokens --------------------------------------------------------------------------------------


def test_tokens_are_emitted_once_and_in_order_however_runs_overlap(stage):
    record = stage.running(tokens=(5, 6))
    commands = stage.handle(1, report((7, record.epoch, 1, (6, 8, 9))))
    assert commands == [(FRONT, Emit(7, 2, (8, 9), (), None, ()))]
    assert stage.handle(1, report((7, record.epoch, 2, (8, 9)))) == []


def test_a_gap_in_the_tokens_raises(stage):
    record = stage.running()
    with pytest.raises(AssertionError, match="gap"):
        stage.handle(1, report((7, record.epoch, 2, (9,))))


def test_each_run_of_a_report_goes_to_its_own_request(stage):
    a, b = stage.running(1, tokens=()), stage.running(2, tokens=())
    commands = stage.handle(
        1, report((1, a.epoch, 0, (5,)), (99, 99, 0, (1, 2)), (2, b.epoch, 0, (6, 7)))
    )
    assert commands == [
        (FRONT, Emit(1, 0, (5,), (), None, ())),
        (FRONT, Emit(2, 0, (6, 7), (), None, ())),
    ]


def test_logprobs_of_a_prompt_are_emitted_with_the_first_tokens(stage):
    record = stage.running(tokens=(), num_prompt_logprobs=0)
    rows = (((-0.5, (), ()), 3), ((-1.5, (), ()), 9))
    first = report((7, record.epoch, 0, (5, 6)), prompt_logprobs=((0, rows),))
    assert of_type(stage.handle(1, first), Emit) == [Emit(7, 0, (5, 6), (), None, rows)]
    second = report((7, record.epoch, 2, (7,)))
    assert of_type(stage.handle(1, second), Emit) == [Emit(7, 2, (7,), (), None, ())]


def test_logprobs_stay_with_their_tokens_when_a_run_overlaps(stage):
    record = stage.running(num_logprobs=0)
    probs = ((-1.0, (), ()), (-2.0, (), ()), (-3.0, (), ()))
    run = report((99, 99, 0, (1,)), (7, record.epoch, 0, (5, 6, 7)), logprobs=((1, probs),))
    assert of_type(stage.handle(1, run), Emit) == [Emit(7, 1, (6, 7), probs[1:], None, ())]


def test_tokens_computed_before_a_preemption_are_emitted(stage):
    record = stage.running()
    both = report((7, record.epoch, 1, (6, 7)), preempted=((7, record.epoch),))
    commands = stage.handle(1, both)
    assert commands[0] == (FRONT, Emit(7, 1, (6, 7), (), None, ()))
    assert commands[1] == (OBSERVER, Preempted(7, 1))
    assert of_type(commands, Assign)[0].outputs == (5, 6, 7)


def test_a_stop_token_ends_the_request_with_reason_stop(stage):
    record = stage.running(tokens=(), stop_token_ids=(9,))
    commands = stage.handle(1, report((7, record.epoch, 0, (8, 9))))
    assert commands == [(FRONT, Emit(7, 0, (8, 9), (), "stop", ()))]
    assert_nothing_left(stage.scheduler)


def test_the_last_tokens_may_come_with_the_kv(stage):
    record = stage.sending(max_tokens=3)
    commands = stage.handle(2, received(record, first=1, tokens=(6, 7)))
    assert of_type(commands, Emit) == [Emit(7, 1, (6, 7), (), "length", ())]
    assert_nothing_left(stage.scheduler)


def test_logprobs_come_with_the_kv(stage):
    record = stage.sending(num_logprobs=0)
    probs = ((-1.0, (), ()), (-2.0, (), ()))
    commands = stage.handle(2, received(record, first=0, tokens=(5, 6), logprobs=probs))
    assert of_type(commands, Emit) == [Emit(7, 1, (6,), probs[1:], None, ())]


# --- submission ----------------------------------------------------------------------------------


def test_an_unknown_model_is_refused_at_once(stage):
    other = Request(7, "other", (1,), request(7).sampling, None, 0, None)
    assert stage.handle(FRONT, Submit(other)) == [
        (FRONT, Rejected(7, "no worker serves the model other", 0.0))
    ]
    assert_nothing_left(stage.scheduler)


def test_a_request_too_large_for_any_worker_is_refused_and_the_last_token_needs_no_room(stage):
    # 20 blocks of 4 positions: 80 positions; the KV of the 81st token is not needed.
    commands = stage.handle(FRONT, Submit(request(1, num_prompt=70, max_tokens=11)))
    assert of_type(commands, Rejected) == []
    commands = stage.handle(FRONT, Submit(request(2, num_prompt=70, max_tokens=12)))
    [refused] = of_type(commands, Rejected)
    assert refused == Rejected(2, "it needs 210 bytes of KV cache; a worker has 200", 0.0)


def test_the_largest_worker_decides_what_fits(stage):
    stage.ready(3, num_blocks=40)
    assert not of_type(stage.handle(FRONT, Submit(request(1, num_prompt=150))), Rejected)


def test_a_lost_worker_s_arena_does_not_count(stage):
    stage.ready(3, num_blocks=40)
    stage.handle(3, WorkerLost(3))
    assert of_type(stage.handle(FRONT, Submit(request(1, num_prompt=150))), Rejected)


def test_while_a_worker_is_starting_no_request_is_too_long():
    stage = Stage(num_workers=2)
    stage.scheduler.registry.change(2, WorkerState.STARTING)
    assert not of_type(stage.handle(FRONT, Submit(request(1, num_prompt=150))), Rejected)


def test_a_request_submitted_twice_raises(stage):
    stage.running()
    with pytest.raises(AssertionError, match="twice"):
        stage.handle(FRONT, Submit(request(7)))


def test_an_unknown_event_raises(stage):
    with pytest.raises(TypeError):
        stage.handle(1, Park())


def test_cancelling_a_finished_request_changes_nothing(stage):
    assert stage.handle(FRONT, Cancel(7, "gone")) == []


# --- the queue -----------------------------------------------------------------------------------


def assigned(commands):
    return [order.request.id for order in of_type(commands, Assign)]


def test_the_queue_is_placed_in_order_of_arrival(stage):
    for i in (3, 1, 2):
        stage.waiting(i)
    assert assigned(stage.room()) == [3, 1, 2]


def test_no_request_passes_a_head_that_does_not_fit(stage):
    big = stage.waiting(1, num_prompt=30)
    stage.waiting(2)
    stage.place = lambda view, row: None if row == big.slot else 1
    assert assigned(stage.handle(1, report())) == []


def test_a_preempted_request_comes_before_one_that_was_never_placed(stage):
    preempted = stage.running(1)
    stage.waiting(2)
    stage.place_at = None
    stage.handle(1, report(preempted=((1, preempted.epoch),)))
    stage.place_at = 1
    assert assigned(stage.room()) == [1, 2]


def test_of_two_requests_preempted_together_the_older_comes_first(stage):
    older, younger = stage.running(1), stage.running(2)
    stage.place_at = None
    stage.handle(1, report(preempted=((2, younger.epoch), (1, older.epoch))))
    stage.place_at = 1
    assert assigned(stage.room()) == [1, 2]


def test_requests_of_a_lost_worker_wait_in_order_of_arrival(stage):
    for i in (3, 1, 2):
        stage.running(i)
    stage.place_at = 2
    assert assigned(stage.handle(1, WorkerLost(1))) == [3, 1, 2]


def test_a_request_whose_owners_die_one_after_the_other_is_refused():
    stage = Stage(MAX_OWNER_DEATHS + 1)
    stage.running(tokens=())
    for worker in range(1, MAX_OWNER_DEATHS):
        stage.place_at = worker + 1
        assert assigned(stage.handle(worker, WorkerLost(worker))) == [7]
    [refused] = of_type(stage.handle(MAX_OWNER_DEATHS, WorkerLost(MAX_OWNER_DEATHS)), Rejected)
    assert refused.request_id == 7 and "died before its next token" in refused.reason
    assert_nothing_left(stage.scheduler)


def test_a_new_token_resets_the_count_of_lost_owners():
    stage = Stage(MAX_OWNER_DEATHS + 1)
    record = stage.running(tokens=())
    for worker in range(1, MAX_OWNER_DEATHS + 1):
        stage.handle(worker, report((7, record.epoch, worker - 1, (5,))))
        stage.place_at = worker + 1
        assert assigned(stage.handle(worker, WorkerLost(worker))) == [7]


def test_a_resumed_request_is_assigned_with_its_output_tokens(stage):
    stage.running(tokens=(5, 6))
    stage.place_at = 2
    [order] = of_type(stage.handle(1, WorkerLost(1)), Assign)
    assert order.outputs == (5, 6)


def test_a_cancelled_request_leaves_the_queue(stage):
    stage.waiting(1)
    stage.handle(FRONT, Cancel(1, "gone"))
    assert_nothing_left(stage.scheduler)


# --- states of workers ---------------------------------------------------------------------------


def test_a_head_too_large_for_all_remaining_workers_is_refused_and_the_next_is_placed(stage):
    stage.ready(3, num_blocks=40)
    stage.place_at = 3
    stage.running(1, num_prompt=150)
    stage.place_at = None
    stage.waiting(2)
    stage.place = lambda view, row: 1 if view.requests.need(row) <= 200 else None
    commands = stage.handle(3, WorkerLost(3))
    assert of_type(commands, Rejected) == [
        Rejected(1, "it needs 380 bytes of KV cache; a worker has 200", 0.0)
    ]
    assert assigned(commands) == [2]


def test_when_the_last_worker_is_lost_all_requests_are_refused(stage):
    stage.running(1)
    stage.waiting(2)
    stage.place_at = None
    for worker in (1, 2, 3):
        commands = stage.handle(worker, WorkerLost(worker))
    assert {rejected.request_id for rejected in of_type(commands, Rejected)} == {1, 2}
    assert all("no worker is left" in rejected.reason for rejected in of_type(commands, Rejected))
    assert_nothing_left(stage.scheduler)


def test_a_lost_worker_stays_lost(stage):
    record = stage.running()
    stage.place_at = 2
    assert of_type(stage.handle(1, WorkerLost(1)), WorkerChanged) == [WorkerChanged(1, "lost")]
    assert stage.handle(1, report((7, record.epoch, 1, (9,)))) == []
    assert stage.ready(1) == [] and stage.handle(0, WorkerLost(1)) == []
    assert stage.scheduler.registry.ledger.workers(WorkerState.LOST) == [1]


def test_nothing_is_sent_to_a_lost_worker(stage):
    stage.running()
    stage.place_at = None
    stage.handle(1, WorkerLost(1))
    stage.scheduler.registry.send(1, Park())
    assert stage.scheduler.registry.take() == []


def test_an_empty_worker_parks_and_wakes(stage):
    assert of_type(stage.tick(ParkWorker(3)), WorkerChanged) == [WorkerChanged(3, "parking")]
    assert stage.handle(3, Parked(acked=1)) == [(OBSERVER, WorkerChanged(3, "parked"))]
    commands = stage.tick(WakeWorker(3))
    assert commands == [(3, Wake()), (OBSERVER, WorkerChanged(3, "waking"))]
    assert stage.ready(3, acked=2) == [(OBSERVER, WorkerChanged(3, "active"))]


def test_a_worker_with_a_request_or_a_reservation_is_not_parked(stage):
    stage.reserving()
    assert stage.tick(ParkWorker(1), ParkWorker(2)) == []


@pytest.mark.parametrize("wake", [False, True])
def test_a_report_written_before_parking_does_not_bring_the_arena_back(stage, wake):
    stage.tick(ParkWorker(3))
    stage.handle(3, Parked(acked=1))
    if wake:
        stage.tick(WakeWorker(3))
    stage.handle(3, report(acked=1))
    assert stage.scheduler.registry.ledger.budget[3] == 0


def test_a_draining_worker_parks_when_it_is_empty(stage):
    record = stage.running()
    assert stage.tick(Drain(1)) == [(OBSERVER, WorkerChanged(1, "draining"))]
    stage.tick(MoveProposal(7, 2, "drain", "recompute"))
    assert record.worker == 2
    assert stage.scheduler.registry.ledger.workers(WorkerState.PARKING) == [1]


def test_only_an_active_worker_is_drained(stage):
    stage.tick(ParkWorker(3))
    assert stage.tick(Drain(3)) == []


def test_a_wake_proposal_makes_a_draining_worker_active_again(stage):
    stage.running()
    stage.tick(Drain(1))
    assert stage.tick(WakeWorker(1)) == [(OBSERVER, WorkerChanged(1, "active"))]
    assert stage.tick(WakeWorker(1)) == []


def test_draining_ends_when_the_queue_finds_no_room(stage):
    stage.running()
    stage.tick(Drain(1))
    stage.waiting(8)
    assert stage.scheduler.registry.ledger.workers(WorkerState.DRAINING) == []


def park(stage, *workers):
    for worker in workers:
        stage.tick(ParkWorker(worker))
        stage.handle(worker, Parked(acked=1))


def test_a_queue_without_room_wakes_just_as_many_workers_as_it_needs(stage):
    park(stage, 2, 3)
    stage.place_at = None
    commands = stage.handle(FRONT, Submit(request(1, num_prompt=60)))
    assert to_workers(commands) == [(2, Wake())]
    assert to_workers(stage.handle(1, report())) == []  # 150 bytes wait, the waking worker has 200
    commands = stage.handle(FRONT, Submit(request(2, num_prompt=60)))
    assert to_workers(commands) == [(3, Wake())]
    assert to_workers(stage.handle(FRONT, Submit(request(3, num_prompt=60)))) == []


def test_only_a_worker_that_serves_the_model_is_woken(stage):
    other = ModelKv("other", 4, 10)
    stage.handle(2, WorkerReady((other,), 200, 8, 0, 0.5, 64, None, (), ""))
    stage.scheduler.registry.ledger._able["m"][2] = False
    park(stage, 2, 3)
    stage.place_at = None
    assert to_workers(stage.handle(FRONT, Submit(request(1)))) == [(3, Wake())]


def test_a_woken_worker_takes_waiting_requests(stage):
    park(stage, 3)
    stage.waiting(1)
    stage.place_at = 3
    assert assigned(stage.ready(3, acked=2)) == [1]


# --- migration -----------------------------------------------------------------------------------


def test_a_move_is_announced_with_its_mode_and_reason(stage):
    stage.running()
    commands = stage.tick(MoveProposal(7, 2, "overflow", "transfer"))
    predicted = (commands[0][1].predicted_s, commands[0][1].predicted_downtime_s)
    assert all(predicted)
    assert commands[0] == (
        OBSERVER,
        MigrationStarted(7, "transfer", 1, 2, "overflow", 0, 10, *predicted),
    )


def test_the_end_of_a_move_reports_its_bytes_and_updates_the_cost_model(stage):
    record = stage.sending()
    before = stage.scheduler.registry.view.cost.link_Bps
    commands = stage.handle(2, received(record, num_bytes=20, transfer_s=0.5))
    [ended] = of_type(commands, MigrationEnded)
    assert ended == MigrationEnded(7, "transfer", 1, 2, 20, 0.5, "moved")
    assert stage.scheduler.registry.view.cost.link_Bps == pytest.approx(0.7 * before + 0.3 * 40)


def test_a_recompute_ends_with_the_first_token_of_the_new_owner(stage):
    record = stage.running()
    stage.tick(MoveProposal(7, 2, "test", "recompute"))
    assert not of_type(stage.handle(2, report()), MigrationEnded)
    commands = stage.handle(2, report((7, record.epoch, 1, (6,))))
    [ended] = of_type(commands, MigrationEnded)
    assert ended == MigrationEnded(7, "recompute", 1, 2, 0, 0.0, "moved")
    assert not of_type(stage.handle(2, report((7, record.epoch, 2, (7,)))), MigrationEnded)


@pytest.mark.parametrize(
    ("source", "event", "why"),
    [
        (2, WorkerLost(2), "worker 2 lost"),
        (2, report(preempted=((7, 2),)), "preempted"),
        (FRONT, Cancel(7, "gone"), "cancelled"),
    ],
)
def test_the_end_of_a_failed_recompute_is_reported_once(stage, source, event, why):
    stage.running()
    stage.tick(MoveProposal(7, 2, "test", "recompute"))
    assert of_type(stage.handle(source, event), MigrationEnded) == [
        MigrationEnded(7, "recompute", 1, 2, 0, 0.0, why)
    ]


def starts_no_move(stage, move):
    return not of_type(stage.tick(move), MigrationStarted)


def test_an_impossible_move_is_not_started(stage):
    stage.running()
    assert starts_no_move(stage, MoveProposal(99, 2, "unknown request"))
    assert starts_no_move(stage, MoveProposal(7, 1, "where it is"))
    stage.tick(Drain(3))
    assert starts_no_move(stage, MoveProposal(7, 3, "not active"))
    stage.handle(2, report(free_blocks=0))
    assert starts_no_move(stage, MoveProposal(7, 2, "no room"))
    stage.handle(2, report(free_blocks=1))
    assert not starts_no_move(stage, MoveProposal(7, 2, "just enough"))


def test_a_move_to_a_worker_without_a_free_slot_is_not_started(stage):
    stage.running(7)
    stage.place_at = 2
    for i in range(8):
        stage.running(10 + i)
    assert starts_no_move(stage, MoveProposal(7, 2, "full"))


@pytest.mark.parametrize("state", ["waiting", "reserving", "sending"])
def test_only_a_running_request_is_moved(stage, state):
    getattr(stage, state)()
    stage.place_at = None
    assert starts_no_move(stage, MoveProposal(7, 3, "busy"))


def test_reserved_bytes_count_as_used_until_the_command_is_acknowledged(stage):
    stage.reserving()
    ledger = stage.scheduler.registry.ledger
    assert ledger.budget[2] == 190
    stage.handle(2, report(acked=1, free_blocks=19))
    assert ledger.budget[2] == 190 and ledger.ordered[2] == 0


@pytest.mark.parametrize(
    ("prefill_token_s", "Bps", "order"),
    [(1.0, 1e9, ReceiveKv), (1e-9, 1.0, Assign), (0.5, 5.0, ReceiveKv)],
)
def test_without_a_mode_of_the_policy_the_cheapest_mode_is_chosen(prefill_token_s, Bps, order):
    stage = Stage()
    stage.scheduler.registry.view.cost = CostModel(prefill_token_s, 0.01, 1e-9, Bps, 0.0)
    stage.scheduler.registry._estimates = None
    stage.running(7, num_prompt=39)
    commands = stage.tick(MoveProposal(7, 2, "test"))
    assert of_type(commands, order)
    if order is ReceiveKv:
        [receive] = of_type(commands, ReceiveKv)
        [started] = of_type(commands, MigrationStarted)
        assert started.mode == ("transfer" if Bps > 10 else "split")
        assert receive.start == started.start and receive.start % 4 == 0
        assert receive.outputs == ((5,) if receive.start else ())


def test_a_move_beyond_the_time_limit_is_deferred_until_it_fits():
    stage = Stage()
    stage.scheduler.registry.view.cost = CostModel(1.0, 0.01, 1e-9, 5.0, 0.0)
    stage.scheduler.registry._estimates = None
    first = stage.running(7, num_prompt=39)
    second = stage.running(8, num_prompt=3)
    stage.tick(MoveProposal(7, 2, "test"), MoveProposal(8, 2, "test"))
    assert (first.state, second.state) == (State.RESERVING, State.RUNNING)
    stage.handle(2, KvRefused(7, first.offer.epoch))
    stage.tick(MoveProposal(8, 2, "test"))
    assert second.state is State.RESERVING


def test_before_its_first_token_a_request_is_not_recomputed_elsewhere(stage):
    stage.running(tokens=())
    [started] = of_type(stage.tick(MoveProposal(7, 2, "test", "recompute")), MigrationStarted)
    assert started.mode == "transfer"


def test_a_request_whose_prompt_is_scored_does_not_move_before_its_first_token(stage):
    record = stage.running(tokens=(), num_prompt_logprobs=0)
    for mode in ("transfer", "recompute", "split", None):
        assert stage.tick(MoveProposal(7, 2, "test", mode)) == []
    stage.handle(1, report((7, record.epoch, 0, (5,))))
    [started] = of_type(stage.tick(MoveProposal(7, 2, "test", "transfer")), MigrationStarted)
    assert started.mode == "transfer"


def test_a_recomputed_request_moves_again_only_after_its_first_token(stage):
    record = stage.running()
    stage.tick(MoveProposal(7, 2, "test", "recompute"))
    assert of_type(stage.tick(MoveProposal(7, 3, "test", "transfer")), MigrationStarted) == []
    stage.handle(2, report((7, record.epoch, 1, (6,))))
    [started] = of_type(stage.tick(MoveProposal(7, 3, "test", "recompute")), MigrationStarted)
    assert started.mode == "recompute"


def fail(stage, record):
    stage.handle(2, KvFailed(7, record.offer.epoch, "checksum"))


def test_after_a_failed_transfer_the_request_is_recomputed(stage):
    record = stage.sending()
    fail(stage, record)
    [started] = of_type(stage.tick(MoveProposal(7, 2, "test", "transfer")), MigrationStarted)
    assert started.mode == "recompute"


def test_a_transfer_that_failed_before_the_first_token_is_not_repeated(stage):
    record = stage.sending(tokens=())
    fail(stage, record)
    assert starts_no_move(stage, MoveProposal(7, 2, "test"))


def test_after_a_change_of_owner_transfers_are_possible_again(stage):
    record = stage.sending()
    fail(stage, record)
    stage.tick(MoveProposal(7, 2, "test"))
    stage.handle(2, report((7, record.epoch, 1, (6,))))
    [started] = of_type(stage.tick(MoveProposal(7, 3, "test", "transfer")), MigrationStarted)
    assert started.mode == "transfer"


def test_epochs_are_never_reused(stage):
    record = stage.sending()
    fail(stage, record)
    stage.tick(MoveProposal(7, 2, "test", "recompute"))
    assert record.epoch == 3


# --- time ----------------------------------------------------------------------------------------


def test_rounds_are_at_least_rebalance_every_s_apart(stage):
    stage.running()
    stage.scheduler.tick(10.0)
    stage.proposals = [ParkWorker(3)]
    assert stage.scheduler.tick(10.9) == []
    assert of_type(stage.scheduler.tick(11.0), Park) == [Park()]


def test_rates_follow_the_decoded_tokens(stage):
    stage.running()
    stage.scheduler.tick(10.0)
    stage.handle(1, report(decode_tokens=20))
    stage.scheduler.tick(12.0)
    view = stage.scheduler.registry.view
    # 10 tokens a second of 2.5 bytes each, blended with 0 at weight 0.3
    assert view.growth_Bps[1] == pytest.approx(0.3 * 25) and view.growth_Bps[2] == 0
    assert view.token_rate == pytest.approx(0.3 * 10)
    stage.scheduler.tick(14.0)
    assert view.growth_Bps[1] == pytest.approx(0.7 * 0.3 * 25)
    assert view.token_rate == pytest.approx(0.7 * 0.3 * 10)


def test_a_view_has_the_waiting_bytes_and_the_number_of_the_round(stage):
    stage.waiting(num_prompt=5)
    stage.tick()
    view = stage.scheduler.registry.view
    assert (view.waiting_bytes, view.tick, view.now) == (2 * KV.block_bytes, 1, stage.now)


def test_a_worker_is_empty_since_its_last_request_finished(stage):
    record = stage.running()
    ledger = stage.scheduler.registry.ledger
    stage.handle(1, report((7, record.epoch, 1, tuple(range(9)))))
    assert ledger.empty_since_s[1] == stage.now


def test_the_expected_output_length_is_learnt_from_finished_requests(stage):
    view = stage.scheduler.registry.view
    assert view.answer_tokens == 128
    record = stage.running(max_tokens=2)
    stage.handle(1, report((7, record.epoch, 1, (6,))))
    assert view.answer_tokens == pytest.approx(0.95 * 128 + 0.05 * 2)


def test_a_cancelled_request_does_not_change_the_expected_output_length(stage):
    stage.running()
    stage.handle(FRONT, Cancel(7, "gone"))
    assert stage.scheduler.registry.view.answer_tokens == 128


def test_the_first_round_may_be_at_time_zero():
    stage = Stage()
    stage.scheduler.tick(0.0)
    assert stage.scheduler.registry.view.tick == 1


def test_a_report_with_columns_of_different_lengths_raises(stage):
    record = stage.running()
    with pytest.raises(ValueError, match="zip"):
        stage.handle(1, replace(report((7, record.epoch, 1, (6,))), counts=()))


def test_prefill_steps_update_the_cost_model(stage):
    stage.running()
    for _ in range(20):
        stage.handle(1, replace(report(), prefill_tokens=100, step_s=100.0))
        stage.tick()
    assert stage.scheduler.registry.view.cost.prefill_token_s == pytest.approx(1.0, rel=0.2)


def test_measured_links_replace_the_default_link(stage):
    stage.handle(1, LinksMeasured((0, 1, 1), (0,), (1,), (0.5,), (100.0,)))
    assert stage.scheduler.registry.estimates.links.between(1, 3).Bps == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("reason", "counted"),
    [
        ("truncated", "failed: truncated"),
        ("no room for what it has grown by", "failed: no room"),
        ("KV layout a is not ours (b)", "failed: KV layout"),
        ("blocks from 4 on, not from 3", "failed: other"),
    ],
)
def test_failures_of_moves_are_counted_by_category(stage, reason, counted):
    record = stage.sending()
    [ended] = of_type(stage.handle(2, KvFailed(7, record.offer.epoch, reason)), MigrationEnded)
    assert ended.outcome == counted


def test_only_a_successful_move_updates_the_overhead_of_moves(stage):
    estimates = stage.scheduler.registry.estimates
    before = estimates.move_s("transfer", (0, 0), 0.1, 0.0)
    fail(stage, stage.sending(request_id=7))
    assert estimates.move_s("transfer", (0, 0), 0.1, 0.0) == before
    record = stage.sending(request_id=8)
    stage.now += 3.0
    stage.handle(2, received(record))
    assert estimates.move_s("transfer", (0, 0), 0.1, 0.0) > 2 * before


def test_the_duration_of_a_move_is_learnt_relative_to_its_work_not_to_its_prediction(
    stage, monkeypatch
):
    learnt = []
    monkeypatch.setattr(
        stage.scheduler.registry.estimates, "record_move", lambda *args: learnt.append(args)
    )
    record = stage.sending()
    plan, began_s = record.plan, record.planned_s
    stage.handle(2, received(record))
    took_s = pytest.approx(stage.now - began_s)
    assert plan.work_s < plan.seconds
    assert learnt == [("transfer", (0, 0), plan.wait_s, plan.work_s, took_s)]


def pauses(stage, monkeypatch):
    """Record the pauses that the estimates learn from."""
    learnt = []
    monkeypatch.setattr(
        stage.scheduler.registry.estimates, "record_move", lambda *args: learnt.append(args)
    )
    return lambda: [args for args in learnt if args[0] == "pause of transfer"]


def test_the_pause_between_last_and_first_token_is_learnt_once(stage, monkeypatch):
    pauses_learnt = pauses(stage, monkeypatch)
    record = stage.sending()
    plan = record.plan
    stage.handle(1, report((7, record.epoch, 1, (6,))))
    last_token_s = stage.now
    stage.handle(2, received(record, 1, (6, 7)))  # of the source: no end of the pause
    stage.now += 0.5
    stage.handle(2, report((7, record.epoch, 3, (8,))))
    paused_s = pytest.approx(stage.now - last_token_s)
    stage.handle(2, report((7, record.epoch, 4, (9,))))
    assert pauses_learnt() == [("pause of transfer", (0, 0), *plan.pause_parts_s, paused_s)]


def test_no_pause_is_learnt_if_the_request_is_preempted_before_its_first_token(stage, monkeypatch):
    pauses_learnt = pauses(stage, monkeypatch)
    record = stage.sending()
    stage.handle(2, received(record))
    stage.handle(2, replace(report(), preempted=((7, record.epoch),)))
    stage.handle(record.worker, report((7, record.epoch, 1, (6,))))
    assert pauses_learnt() == []


def test_no_pause_is_learnt_if_the_request_had_no_token_before_it_moved(stage, monkeypatch):
    pauses_learnt = pauses(stage, monkeypatch)
    record = stage.sending(tokens=())
    stage.handle(2, received(record))
    stage.handle(2, report((7, record.epoch, 0, (5,))))
    assert pauses_learnt() == []


def test_ticks_age_the_overhead_of_moves(stage):
    estimates = stage.scheduler.registry.estimates
    stage.running()  # else the cluster is at rest
    for _ in range(20):
        estimates.record_move("split", (0, 0), 0.0, 1.0, 3.0)
    for _ in range(12):
        stage.now += STALE_S
        stage.tick()
    assert estimates.move_s("split", (0, 0), 0.0, 1.0) < 1.3


def test_the_speed_of_a_link_counts_the_bytes_of_concurrent_transfers(stage):
    first, second = stage.running(7), stage.running(8)
    stage.tick(MoveProposal(7, 2, "test", "transfer"), MoveProposal(8, 2, "test", "transfer"))
    for record in (first, second):
        stage.handle(2, KvReserved(record.request.id, record.offer.epoch, 0))
    links = stage.scheduler.registry.estimates.links
    stage.handle(2, received(second, num_bytes=10, transfer_s=1.0))
    # The mean of the default, close to 0, and of 1 s for 20 bytes less the latency.
    assert 1 / links.between(1, 2).Bps == pytest.approx(0.5 * 1.0 / 20, rel=0.01)


def test_of_two_moves_of_one_request_the_first_is_started(stage):
    stage.running(7)
    commands = stage.tick(
        MoveProposal(7, 2, "test", "transfer"), MoveProposal(7, 3, "test", "transfer")
    )
    assert [started.dst for started in of_type(commands, MigrationStarted)] == [2]


def test_bytes_in_flight_are_counted_until_the_move_ends(stage):
    record = stage.sending()
    assert stage.scheduler.registry.in_flight.bytes_between[0, 0] == 10
    stage.handle(2, received(record))
    assert not any(stage.scheduler.registry.in_flight.bytes_between.values())


def test_a_cached_prefix_reduces_the_load_of_the_link_and_the_work(stage, monkeypatch):
    learnt = []
    estimates = stage.scheduler.registry.estimates
    monkeypatch.setattr(
        estimates,
        "record_move",
        lambda mode, hosts, wait_s, work_s, took_s: learnt.append((mode, work_s)),
    )
    record = stage.running(num_prompt=9)
    stage.tick(MoveProposal(7, 2, "test", "transfer"))
    stage.handle(2, KvReserved(7, record.offer.epoch, 2 * KV.block_size))
    in_flight = stage.scheduler.registry.in_flight
    assert in_flight.bytes_between[0, 0] == KV.block_bytes
    stage.handle(2, received(record, num_bytes=KV.block_bytes))
    assert not any(in_flight.bytes_between.values())
    left_s = Link(CostModel().link_latency_s, CostModel().link_Bps).transfer_s(KV.block_bytes)
    assert learnt == [("transfer", pytest.approx(left_s))]


def test_a_worker_is_empty_since_it_became_ready(stage):
    park(stage, 3)
    stage.tick(WakeWorker(3))
    stage.ready(3, acked=2)
    assert stage.scheduler.registry.ledger.empty_since_s[3] == stage.now


def test_a_worker_that_stops_draining_takes_the_head_of_the_queue_at_once(stage):
    stage.running()
    stage.tick(Drain(1))
    stage.place = lambda view, row: 1 if view.active()[1] else None
    assert assigned(stage.handle(FRONT, Submit(request(8)))) == [8]


def test_only_an_active_or_draining_worker_is_parked(stage):
    stage.tick(ParkWorker(3))
    assert stage.tick(ParkWorker(3)) == []
    stage.handle(3, Parked(acked=1))
    assert stage.tick(ParkWorker(3)) == []
    stage.tick(WakeWorker(3))
    assert stage.tick(ParkWorker(3)) == []


# --- when the queue is placed --------------------------------------------------------------------


def record_placements(stage):
    """The rows for which the policy is asked for a worker from now on."""
    rows, place = [], stage.place
    stage.place = lambda view, row: (rows.append(row), place(view, row))[1]
    return rows


def test_a_report_without_new_room_does_not_place_the_queue(stage):
    stage.running(num_prompt=10)
    stage.handle(1, report(acked=1, free_blocks=10))
    stage.waiting(8)
    rows = record_placements(stage)
    stage.handle(1, report(acked=1, free_blocks=9))
    stage.handle(1, report(acked=1, free_blocks=9))
    assert not rows


def test_more_free_bytes_place_the_queue(stage):
    stage.running(num_prompt=10)
    stage.handle(1, report(acked=1, free_blocks=10))
    stage.waiting(8)
    assert assigned(stage.handle(1, report(acked=1, free_blocks=11))) == [8]


def test_a_free_slot_places_the_queue_even_with_fewer_free_bytes(stage):
    record = stage.running(num_prompt=10, max_tokens=2)
    stage.handle(1, report(acked=1, free_blocks=10))
    stage.waiting(8)
    ended = report((7, record.epoch, 1, (6,)), acked=1, free_blocks=9)
    assert assigned(stage.handle(1, ended)) == [8]


def test_a_new_request_places_the_queue(stage):
    stage.waiting(8)
    assert assigned(stage.handle(FRONT, Submit(request(9)))) == [8, 9]


def test_after_a_tick_any_report_places_the_queue(stage):
    stage.waiting(8)
    stage.tick()
    assert assigned(stage.handle(1, report())) == [8]
