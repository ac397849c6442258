"""What the cluster scheduler does beside its transition table."""

from dataclasses import replace

import pytest

from mellmpi.costs import CostModel, Link
from mellmpi.costs.links import LOOK_AGAIN_S
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
from mellmpi.scheduler.requests import DEATHS, State
from mellmpi.scheduler.view import Drain, ParkWorker, WakeWorker
from tests.scheduler.stage import (
    KV,
    Stage,
    assert_nothing_left,
    received,
    report,
    request,
    to_workers,
    told,
)


@pytest.fixture
def stage():
    return Stage()


# --- tokens --------------------------------------------------------------------------------------


def test_tokens_are_emitted_once_and_in_order_however_runs_overlap(stage):
    record = stage.running(tokens=(5, 6))
    commands = stage.tell(1, report((7, record.epoch, 1, (6, 8, 9))))
    assert commands == [(FRONT, Emit(7, 2, (8, 9), (), None))]
    assert stage.tell(1, report((7, record.epoch, 2, (8, 9)))) == []


def test_a_gap_in_the_tokens_is_a_bug(stage):
    record = stage.running()
    with pytest.raises(AssertionError, match="gap"):
        stage.tell(1, report((7, record.epoch, 2, (9,))))


def test_each_run_of_a_report_goes_to_its_own_request(stage):
    a, b = stage.running(1, tokens=()), stage.running(2, tokens=())
    commands = stage.tell(
        1, report((1, a.epoch, 0, (5,)), (99, 99, 0, (1, 2)), (2, b.epoch, 0, (6, 7)))
    )
    assert commands == [(FRONT, Emit(1, 0, (5,), (), None)), (FRONT, Emit(2, 0, (6, 7), (), None))]


def test_logprobs_stay_with_their_tokens_when_a_run_overlaps(stage):
    record = stage.running(num_logprobs=0)
    probs = ((-1.0, (), ()), (-2.0, (), ()), (-3.0, (), ()))
    run = report((99, 99, 0, (1,)), (7, record.epoch, 0, (5, 6, 7)), logprobs=((1, probs),))
    assert told(stage.tell(1, run), Emit) == [Emit(7, 1, (6, 7), probs[1:], None)]


def test_what_was_produced_before_a_preemption_is_emitted_not_thrown_away(stage):
    record = stage.running()
    both = report((7, record.epoch, 1, (6, 7)), preempted=((7, record.epoch),))
    commands = stage.tell(1, both)
    assert commands[0] == (FRONT, Emit(7, 1, (6, 7), (), None))
    assert commands[1] == (OBSERVER, Preempted(7, 1))
    assert told(commands, Assign)[0].outputs == (5, 6, 7)


def test_a_stop_token_ends_the_request_with_reason_stop(stage):
    record = stage.running(tokens=(), stop_token_ids=(9,))
    commands = stage.tell(1, report((7, record.epoch, 0, (8, 9))))
    assert commands == [(FRONT, Emit(7, 0, (8, 9), (), "stop"))]
    assert_nothing_left(stage.scheduler)


def test_the_last_tokens_may_come_with_the_kv(stage):
    record = stage.sending(max_tokens=3)
    commands = stage.tell(2, received(record, first=1, tokens=(6, 7)))
    assert told(commands, Emit) == [Emit(7, 1, (6, 7), (), "length")]
    assert_nothing_left(stage.scheduler)


def test_logprobs_come_with_the_kv(stage):
    record = stage.sending(num_logprobs=0)
    probs = ((-1.0, (), ()), (-2.0, (), ()))
    commands = stage.tell(2, received(record, first=0, tokens=(5, 6), logprobs=probs))
    assert told(commands, Emit) == [Emit(7, 1, (6,), probs[1:], None)]


# --- submission ----------------------------------------------------------------------------------


def test_an_unknown_model_is_refused_at_once(stage):
    other = Request(7, "other", (1,), request(7).sampling, None)
    assert stage.tell(FRONT, Submit(other)) == [
        (FRONT, Rejected(7, "no worker serves the model other"))
    ]
    assert_nothing_left(stage.scheduler)


def test_what_fits_in_no_worker_is_refused_at_once_and_the_last_token_needs_no_room(stage):
    # 20 blocks of 4 positions: 80 of them; the 81st token is never read.
    assert told(stage.tell(FRONT, Submit(request(1, num_prompt=70, max_tokens=11))), Rejected) == []
    [refused] = told(stage.tell(FRONT, Submit(request(2, num_prompt=70, max_tokens=12))), Rejected)
    assert refused == Rejected(2, "it needs 210 bytes of KV cache; a worker has 200")


def test_the_largest_worker_decides_what_fits(stage):
    stage.ready(3, num_blocks=40)
    assert not told(stage.tell(FRONT, Submit(request(1, num_prompt=150))), Rejected)


def test_a_lost_worker_s_arena_does_not_count(stage):
    stage.ready(3, num_blocks=40)
    stage.tell(3, WorkerLost(3))
    assert told(stage.tell(FRONT, Submit(request(1, num_prompt=150))), Rejected)


def test_as_long_as_a_worker_is_starting_nothing_is_too_long():
    stage = Stage(num_workers=2)
    stage.scheduler.registry.change(2, WorkerState.STARTING)
    assert not told(stage.tell(FRONT, Submit(request(1, num_prompt=150))), Rejected)


def test_a_request_submitted_twice_is_a_bug(stage):
    stage.running()
    with pytest.raises(AssertionError, match="twice"):
        stage.tell(FRONT, Submit(request(7)))


def test_an_unknown_event_is_a_bug(stage):
    with pytest.raises(TypeError):
        stage.tell(1, Park())


def test_cancelling_what_is_over_changes_nothing(stage):
    assert stage.tell(FRONT, Cancel(7, "gone")) == []


# --- the queue -----------------------------------------------------------------------------------


def assigned(commands):
    return [order.request.id for order in told(commands, Assign)]


def test_the_queue_is_placed_in_the_order_it_came(stage):
    for i in (3, 1, 2):
        stage.waiting(i)
    assert assigned(stage.room()) == [3, 1, 2]


def test_nothing_passes_a_head_that_fits_nowhere(stage):
    big = stage.waiting(1, num_prompt=30)
    stage.waiting(2)
    stage.place = lambda view, row: None if row == big.slot else 1
    assert assigned(stage.tell(1, report())) == []


def test_who_lost_its_place_comes_before_who_never_had_one(stage):
    preempted = stage.running(1)
    stage.waiting(2)
    stage.place_at = None
    stage.tell(1, report(preempted=((1, preempted.epoch),)))
    stage.place_at = 1
    assert assigned(stage.room()) == [1, 2]


def test_of_two_preempted_at_once_the_older_comes_first(stage):
    older, younger = stage.running(1), stage.running(2)
    stage.place_at = None
    stage.tell(1, report(preempted=((2, younger.epoch), (1, older.epoch))))
    stage.place_at = 1
    assert assigned(stage.room()) == [1, 2]


def test_requests_of_a_lost_worker_wait_in_the_order_they_came(stage):
    for i in (3, 1, 2):
        stage.running(i)
    stage.place_at = 2
    assert assigned(stage.tell(1, WorkerLost(1))) == [3, 1, 2]


def test_a_request_that_kills_worker_after_worker_is_refused():
    stage = Stage(DEATHS + 1)
    stage.running(tokens=())
    for worker in range(1, DEATHS):
        stage.place_at = worker + 1
        assert assigned(stage.tell(worker, WorkerLost(worker))) == [7]
    [refused] = told(stage.tell(DEATHS, WorkerLost(DEATHS)), Rejected)
    assert refused.request_id == 7 and "died before its next token" in refused.reason
    assert_nothing_left(stage.scheduler)


def test_a_token_between_deaths_clears_the_request():
    stage = Stage(DEATHS + 1)
    record = stage.running(tokens=())
    for worker in range(1, DEATHS + 1):
        stage.tell(worker, report((7, record.epoch, worker - 1, (5,))))
        stage.place_at = worker + 1
        assert assigned(stage.tell(worker, WorkerLost(worker))) == [7]


def test_a_resumed_request_takes_its_tokens_along(stage):
    stage.running(tokens=(5, 6))
    stage.place_at = 2
    [order] = told(stage.tell(1, WorkerLost(1)), Assign)
    assert order.outputs == (5, 6)


def test_a_cancelled_request_leaves_the_queue(stage):
    stage.waiting(1)
    stage.tell(FRONT, Cancel(1, "gone"))
    assert_nothing_left(stage.scheduler)


# --- workers come and go -------------------------------------------------------------------------


def test_a_head_that_no_worker_left_can_hold_is_refused_and_the_next_one_placed(stage):
    stage.ready(3, num_blocks=40)
    stage.place_at = 3
    stage.running(1, num_prompt=150)
    stage.place_at = None
    stage.waiting(2)
    stage.place = lambda view, row: 1 if view.requests.need(row) <= 200 else None
    commands = stage.tell(3, WorkerLost(3))
    assert told(commands, Rejected) == [
        Rejected(1, "it needs 380 bytes of KV cache; a worker has 200")
    ]
    assert assigned(commands) == [2]


def test_with_the_last_worker_all_requests_are_refused(stage):
    stage.running(1)
    stage.waiting(2)
    stage.place_at = None
    for worker in (1, 2, 3):
        commands = stage.tell(worker, WorkerLost(worker))
    assert {rejected.request_id for rejected in told(commands, Rejected)} == {1, 2}
    assert all("no worker is left" in rejected.reason for rejected in told(commands, Rejected))
    assert_nothing_left(stage.scheduler)


def test_a_lost_worker_is_lost_for_good(stage):
    record = stage.running()
    stage.place_at = 2
    assert told(stage.tell(1, WorkerLost(1)), WorkerChanged) == [WorkerChanged(1, "lost")]
    assert stage.tell(1, report((7, record.epoch, 1, (9,)))) == []
    assert stage.ready(1) == [] and stage.tell(0, WorkerLost(1)) == []
    assert stage.scheduler.registry.ledger.workers(WorkerState.LOST) == [1]


def test_nothing_is_sent_to_a_lost_worker(stage):
    stage.running()
    stage.place_at = None
    stage.tell(1, WorkerLost(1))
    stage.scheduler.registry.send(1, Park())
    assert stage.scheduler.registry.take() == []


def test_a_worker_that_holds_nothing_parks_and_wakes(stage):
    assert told(stage.tick(ParkWorker(3)), WorkerChanged) == [WorkerChanged(3, "parking")]
    assert stage.tell(3, Parked(acked=1)) == [(OBSERVER, WorkerChanged(3, "parked"))]
    commands = stage.tick(WakeWorker(3))
    assert commands == [(3, Wake()), (OBSERVER, WorkerChanged(3, "waking"))]
    assert stage.ready(3, acked=2) == [(OBSERVER, WorkerChanged(3, "active"))]


def test_a_worker_that_holds_or_expects_something_is_not_parked(stage):
    stage.reserving()
    assert stage.tick(ParkWorker(1), ParkWorker(2)) == []


@pytest.mark.parametrize("wake", [False, True])
def test_a_report_written_before_parking_does_not_bring_the_arena_back(stage, wake):
    stage.tick(ParkWorker(3))
    stage.tell(3, Parked(acked=1))
    if wake:
        stage.tick(WakeWorker(3))
    stage.tell(3, report(acked=1))
    assert stage.scheduler.registry.ledger.budget[3] == 0


def test_a_drained_worker_takes_nothing_and_parks_when_it_is_empty(stage):
    record = stage.running()
    assert stage.tick(Drain(1)) == [(OBSERVER, WorkerChanged(1, "draining"))]
    stage.tick(MoveProposal(7, 2, "drain", "recompute"))
    assert record.worker == 2
    assert stage.scheduler.registry.ledger.workers(WorkerState.PARKING) == [1]


def test_only_an_active_worker_is_drained(stage):
    stage.tick(ParkWorker(3))
    assert stage.tick(Drain(3)) == []


def test_a_draining_worker_is_kept_when_the_policy_wants_it(stage):
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
        stage.tell(worker, Parked(acked=1))


def test_a_queue_without_room_wakes_as_many_workers_as_it_needs_and_no_more(stage):
    park(stage, 2, 3)
    stage.place_at = None
    commands = stage.tell(FRONT, Submit(request(1, num_prompt=60)))
    assert to_workers(commands) == [(2, Wake())]
    assert to_workers(stage.tell(1, report())) == []  # 150 bytes wait, 200 are coming
    commands = stage.tell(FRONT, Submit(request(2, num_prompt=60)))
    assert to_workers(commands) == [(3, Wake())]
    assert to_workers(stage.tell(FRONT, Submit(request(3, num_prompt=60)))) == []


def test_only_a_worker_that_serves_the_model_is_woken(stage):
    other = ModelKv("other", 4, 10)
    stage.tell(2, WorkerReady((other,), 200, 8, 0, 0.5, 64, None, (), ""))
    stage.scheduler.registry.ledger._able["m"][2] = False
    park(stage, 2, 3)
    stage.place_at = None
    assert to_workers(stage.tell(FRONT, Submit(request(1)))) == [(3, Wake())]


def test_a_worker_ready_again_takes_what_waits(stage):
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


def test_a_move_says_how_much_came_and_teaches_the_cost_model(stage):
    record = stage.sending()
    before = stage.scheduler.registry.view.cost.link_Bps
    commands = stage.tell(2, received(record, num_bytes=20, transfer_s=0.5))
    assert told(commands, MigrationEnded) == [MigrationEnded(7, "transfer", 1, 2, 20, 0.5, "moved")]
    assert stage.scheduler.registry.view.cost.link_Bps == pytest.approx(0.7 * before + 0.3 * 40)


def test_a_recompute_ends_with_the_first_token_of_the_new_owner(stage):
    record = stage.running()
    stage.tick(MoveProposal(7, 2, "test", "recompute"))
    assert not told(stage.tell(2, report()), MigrationEnded)
    commands = stage.tell(2, report((7, record.epoch, 1, (6,))))
    assert told(commands, MigrationEnded) == [MigrationEnded(7, "recompute", 1, 2, 0, 0.0, "moved")]
    assert not told(stage.tell(2, report((7, record.epoch, 2, (7,)))), MigrationEnded)


@pytest.mark.parametrize(
    ("source", "event", "why"),
    [
        (2, WorkerLost(2), "worker 2 lost"),
        (2, report(preempted=((7, 2),)), "preempted"),
        (FRONT, Cancel(7, "gone"), "cancelled"),
    ],
)
def test_a_recompute_that_comes_to_nothing_is_told_once(stage, source, event, why):
    stage.running()
    stage.tick(MoveProposal(7, 2, "test", "recompute"))
    assert told(stage.tell(source, event), MigrationEnded) == [
        MigrationEnded(7, "recompute", 1, 2, 0, 0.0, why)
    ]


def nothing_moves(stage, move):
    return not told(stage.tick(move), MigrationStarted)


def test_a_move_that_cannot_be_is_not_begun(stage):
    stage.running()
    assert nothing_moves(stage, MoveProposal(99, 2, "unknown request"))
    assert nothing_moves(stage, MoveProposal(7, 1, "where it is"))
    stage.tick(Drain(3))
    assert nothing_moves(stage, MoveProposal(7, 3, "not active"))
    stage.tell(2, report(free_blocks=0))
    assert nothing_moves(stage, MoveProposal(7, 2, "no room"))
    stage.tell(2, report(free_blocks=1))
    assert not nothing_moves(stage, MoveProposal(7, 2, "just enough"))


def test_a_move_to_a_worker_with_all_seats_taken_is_not_begun(stage):
    stage.running(7)
    stage.place_at = 2
    for i in range(8):
        stage.running(10 + i)
    assert nothing_moves(stage, MoveProposal(7, 2, "full"))


@pytest.mark.parametrize("state", ["waiting", "reserving", "sending"])
def test_only_what_runs_is_moved(stage, state):
    getattr(stage, state)()
    stage.place_at = None
    assert nothing_moves(stage, MoveProposal(7, 3, "busy"))


def test_the_order_to_receive_counts_as_spent_until_it_is_acknowledged(stage):
    stage.reserving()
    ledger = stage.scheduler.registry.ledger
    assert ledger.budget[2] == 190
    stage.tell(2, report(acked=1, free_blocks=19))
    assert ledger.budget[2] == 190 and ledger.ordered[2] == 0


@pytest.mark.parametrize(
    ("prefill_token_s", "Bps", "order"),
    [(1.0, 1e9, ReceiveKv), (1e-9, 1.0, Assign), (0.5, 5.0, ReceiveKv)],
)
def test_the_way_that_takes_least_is_taken_when_the_policy_has_none(prefill_token_s, Bps, order):
    stage = Stage()
    stage.scheduler.registry.view.cost = CostModel(prefill_token_s, 0.01, 1e-9, Bps, 0.0)
    stage.scheduler.registry._estimates = None
    stage.running(7, num_prompt=39)
    commands = stage.tick(MoveProposal(7, 2, "test"))
    assert told(commands, order)
    if order is ReceiveKv:
        [receive] = told(commands, ReceiveKv)
        [started] = told(commands, MigrationStarted)
        assert started.mode == ("transfer" if Bps > 10 else "split")
        assert receive.start == started.start and receive.start % 4 == 0
        assert receive.outputs == ((5,) if receive.start else ())


def test_a_move_that_fits_no_budget_is_deferred_and_goes_when_it_does():
    stage = Stage()
    stage.scheduler.registry.view.cost = CostModel(1.0, 0.01, 1e-9, 5.0, 0.0)
    stage.scheduler.registry._estimates = None
    first = stage.running(7, num_prompt=39)
    second = stage.running(8, num_prompt=3)
    stage.tick(MoveProposal(7, 2, "test"), MoveProposal(8, 2, "test"))
    assert (first.state, second.state) == (State.RESERVING, State.RUNNING)
    stage.tell(2, KvRefused(7, first.offer.epoch))
    stage.tick(MoveProposal(8, 2, "test"))
    assert second.state is State.RESERVING


def test_before_its_first_token_a_request_is_not_computed_anew_elsewhere(stage):
    stage.running(tokens=())
    [started] = told(stage.tick(MoveProposal(7, 2, "test", "recompute")), MigrationStarted)
    assert started.mode == "transfer"


def test_computed_anew_a_request_moves_on_only_after_its_first_token(stage):
    record = stage.running()
    stage.tick(MoveProposal(7, 2, "test", "recompute"))
    assert told(stage.tick(MoveProposal(7, 3, "test", "transfer")), MigrationStarted) == []
    stage.tell(2, report((7, record.epoch, 1, (6,))))
    [started] = told(stage.tick(MoveProposal(7, 3, "test", "recompute")), MigrationStarted)
    assert started.mode == "recompute"


def fail(stage, record):
    stage.tell(2, KvFailed(7, record.offer.epoch, "checksum"))


def test_after_a_failed_transfer_it_is_recomputed(stage):
    record = stage.sending()
    fail(stage, record)
    [started] = told(stage.tick(MoveProposal(7, 2, "test", "transfer")), MigrationStarted)
    assert started.mode == "recompute"


def test_a_failed_transfer_before_the_first_token_is_not_tried_again(stage):
    record = stage.sending(tokens=())
    fail(stage, record)
    assert nothing_moves(stage, MoveProposal(7, 2, "test"))


def test_a_new_owner_is_trusted_with_transfers_again(stage):
    record = stage.sending()
    fail(stage, record)
    stage.tick(MoveProposal(7, 2, "test"))
    stage.tell(2, report((7, record.epoch, 1, (6,))))
    [started] = told(stage.tick(MoveProposal(7, 3, "test", "transfer")), MigrationStarted)
    assert started.mode == "transfer"


def test_epochs_are_never_used_again(stage):
    record = stage.sending()
    fail(stage, record)
    stage.tick(MoveProposal(7, 2, "test", "recompute"))
    assert record.epoch == 3


# --- time ----------------------------------------------------------------------------------------


def test_the_policy_is_asked_at_most_once_in_rebalance_every_s(stage):
    stage.running()
    stage.scheduler.tick(10.0)
    stage.proposals = [ParkWorker(3)]
    assert stage.scheduler.tick(10.9) == []
    assert told(stage.scheduler.tick(11.0), Park) == [Park()]


def test_rates_follow_what_workers_decode(stage):
    stage.running()
    stage.scheduler.tick(10.0)
    stage.tell(1, report(decode_tokens=20))
    stage.scheduler.tick(12.0)
    view = stage.scheduler.registry.view
    # 10 tokens a second of 2.5 bytes each, blended into nothing with weight 0.3
    assert view.growth_Bps[1] == pytest.approx(0.3 * 25) and view.growth_Bps[2] == 0
    assert view.token_rate == pytest.approx(0.3 * 10)
    stage.scheduler.tick(14.0)
    assert view.growth_Bps[1] == pytest.approx(0.7 * 0.3 * 25)
    assert view.token_rate == pytest.approx(0.7 * 0.3 * 10)


def test_a_view_tells_what_waits_and_how_often_it_was_made(stage):
    stage.waiting(num_prompt=5)
    stage.tick()
    view = stage.scheduler.registry.view
    assert (view.waiting_bytes, view.tick, view.now) == (2 * KV.block_bytes, 1, stage.now)


def test_a_worker_says_since_when_it_is_empty(stage):
    record = stage.running()
    ledger = stage.scheduler.registry.ledger
    stage.tell(1, report((7, record.epoch, 1, tuple(range(9)))))
    assert ledger.empty_since_s[1] == stage.now


def test_the_length_of_answers_to_come_is_learned_from_those_that_ended(stage):
    view = stage.scheduler.registry.view
    assert view.answer_tokens == 128
    record = stage.running(max_tokens=2)
    stage.tell(1, report((7, record.epoch, 1, (6,))))
    assert view.answer_tokens == pytest.approx(0.95 * 128 + 0.05 * 2)


def test_a_cancelled_answer_says_nothing_about_lengths(stage):
    stage.running()
    stage.tell(FRONT, Cancel(7, "gone"))
    assert stage.scheduler.registry.view.answer_tokens == 128


def test_the_policy_is_asked_from_the_first_moment_on():
    stage = Stage()
    stage.scheduler.tick(0.0)
    assert stage.scheduler.registry.view.tick == 1


def test_a_report_whose_columns_disagree_is_a_bug(stage):
    record = stage.running()
    with pytest.raises(ValueError, match="zip"):
        stage.tell(1, replace(report((7, record.epoch, 1, (6,))), counts=()))


def test_steps_that_prefilled_teach_the_cost_model(stage):
    stage.running()
    for _ in range(20):
        stage.tell(1, replace(report(), prefill_tokens=100, step_s=100.0))
        stage.tick()
    assert stage.scheduler.registry.view.cost.prefill_token_s == pytest.approx(1.0, rel=0.2)


def test_measured_links_replace_what_was_guessed(stage):
    stage.tell(1, LinksMeasured((0, 1, 1), (0,), (1,), (0.5,), (100.0,)))
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
def test_why_a_move_failed_is_counted_in_few_words(stage, reason, counted):
    record = stage.sending()
    [ended] = told(stage.tell(2, KvFailed(7, record.offer.epoch, reason)), MigrationEnded)
    assert ended.outcome == counted


def test_a_move_that_succeeded_teaches_what_goes_on_around_it_and_one_that_failed_does_not(stage):
    estimates = stage.scheduler.registry.estimates
    before = estimates.move_s("transfer", (0, 0), 0.1, 0.0)
    fail(stage, stage.sending(request_id=7))
    assert estimates.move_s("transfer", (0, 0), 0.1, 0.0) == before
    record = stage.sending(request_id=8)
    stage.now += 3.0
    stage.tell(2, received(record))
    assert estimates.move_s("transfer", (0, 0), 0.1, 0.0) > 2 * before


def test_what_a_move_took_teaches_against_its_work_not_against_what_was_predicted(
    stage, monkeypatch
):
    taught = []
    monkeypatch.setattr(
        stage.scheduler.registry.estimates, "took", lambda *args: taught.append(args)
    )
    record = stage.sending()
    plan, began_s = record.plan, record.planned_s
    stage.tell(2, received(record))
    took_s = pytest.approx(stage.now - began_s)
    assert plan.work_s < plan.seconds
    assert taught == [("transfer", (0, 0), plan.wait_s, plan.work_s, took_s)]


def pauses(stage, monkeypatch):
    """What the estimates hear of pauses from now on."""
    heard = []
    monkeypatch.setattr(
        stage.scheduler.registry.estimates, "took", lambda *args: heard.append(args)
    )
    return lambda: [args for args in heard if args[0] == "pause of transfer"]


def test_the_time_from_the_last_token_here_to_the_first_one_there_teaches_once(stage, monkeypatch):
    heard = pauses(stage, monkeypatch)
    record = stage.sending()
    plan = record.plan
    stage.tell(1, report((7, record.epoch, 1, (6,))))
    told_s = stage.now
    stage.tell(2, received(record, 1, (6, 7)))  # made here before it stopped: they end no pause
    stage.now += 0.5
    stage.tell(2, report((7, record.epoch, 3, (8,))))
    paused_s = pytest.approx(stage.now - told_s)
    stage.tell(2, report((7, record.epoch, 4, (9,))))
    assert heard() == [("pause of transfer", (0, 0), *plan.last_s, paused_s)]


def test_a_request_preempted_before_its_first_token_there_teaches_nothing(stage, monkeypatch):
    heard = pauses(stage, monkeypatch)
    record = stage.sending()
    stage.tell(2, received(record))
    stage.tell(2, replace(report(), preempted=((7, record.epoch),)))
    stage.tell(record.worker, report((7, record.epoch, 1, (6,))))
    assert heard() == []


def test_a_request_that_had_no_token_before_it_moved_teaches_nothing(stage, monkeypatch):
    heard = pauses(stage, monkeypatch)
    record = stage.sending(tokens=())
    stage.tell(2, received(record))
    stage.tell(2, report((7, record.epoch, 0, (5,))))
    assert heard() == []


def test_every_look_of_the_policy_lets_old_experience_age(stage):
    estimates = stage.scheduler.registry.estimates
    stage.running()  # or it would look no more
    for _ in range(20):
        estimates.took("split", (0, 0), 0.0, 1.0, 3.0)
    for _ in range(12):
        stage.now += LOOK_AGAIN_S
        stage.tick()
    assert estimates.move_s("split", (0, 0), 0.0, 1.0) < 1.3


def test_bytes_of_others_on_the_link_count_when_a_transfer_is_slow(stage):
    first, second = stage.running(7), stage.running(8)
    stage.tick(MoveProposal(7, 2, "test", "transfer"), MoveProposal(8, 2, "test", "transfer"))
    for record in (first, second):
        stage.tell(2, KvReserved(record.request.id, record.offer.epoch, 0))
    links = stage.scheduler.registry.estimates.links
    stage.tell(2, received(second, num_bytes=10, transfer_s=1.0))
    # The mean of the guess, which is next to nothing, and of 1 s for 20 bytes less the latency.
    assert 1 / links.between(1, 2).Bps == pytest.approx(0.5 * 1.0 / 20, rel=0.01)


def test_of_two_moves_of_one_request_the_first_is_done(stage):
    stage.running(7)
    commands = stage.tick(
        MoveProposal(7, 2, "test", "transfer"), MoveProposal(7, 3, "test", "transfer")
    )
    assert [started.dst for started in told(commands, MigrationStarted)] == [2]


def test_what_is_in_flight_is_counted_until_it_has_ended(stage):
    record = stage.sending()
    assert stage.scheduler.registry.in_flight.bytes_between[0, 0] == 10
    stage.tell(2, received(record))
    assert not any(stage.scheduler.registry.in_flight.bytes_between.values())


def test_what_the_destination_knows_is_no_load_of_the_link_and_no_work(stage, monkeypatch):
    taught = []
    estimates = stage.scheduler.registry.estimates
    monkeypatch.setattr(
        estimates, "took", lambda mode, hosts, wait_s, work_s, took_s: taught.append((mode, work_s))
    )
    record = stage.running(num_prompt=9)
    stage.tick(MoveProposal(7, 2, "test", "transfer"))
    stage.tell(2, KvReserved(7, record.offer.epoch, 2 * KV.block_size))
    in_flight = stage.scheduler.registry.in_flight
    assert in_flight.bytes_between[0, 0] == KV.block_bytes
    stage.tell(2, received(record, num_bytes=KV.block_bytes))
    assert not any(in_flight.bytes_between.values())
    left_s = Link(CostModel().link_latency_s, CostModel().link_Bps).transfer_s(KV.block_bytes)
    assert taught == [("transfer", pytest.approx(left_s))]


def test_a_worker_is_empty_since_it_became_ready(stage):
    park(stage, 3)
    stage.tick(WakeWorker(3))
    stage.ready(3, acked=2)
    assert stage.scheduler.registry.ledger.empty_since_s[3] == stage.now


def test_a_worker_kept_from_draining_takes_the_head_of_the_queue_at_once(stage):
    stage.running()
    stage.tick(Drain(1))
    stage.place = lambda view, row: 1 if view.active()[1] else None
    assert assigned(stage.tell(FRONT, Submit(request(8)))) == [8]


def test_only_an_active_or_draining_worker_is_parked(stage):
    stage.tick(ParkWorker(3))
    assert stage.tick(ParkWorker(3)) == []
    stage.tell(3, Parked(acked=1))
    assert stage.tick(ParkWorker(3)) == []
    stage.tick(WakeWorker(3))
    assert stage.tick(ParkWorker(3)) == []


# --- who waits is tried again when there is more room --------------------------------------------


def tried(stage):
    """Counts from here on how often the policy is asked for a place."""
    asked, place = [], stage.place
    stage.place = lambda view, row: (asked.append(row), place(view, row))[1]
    return asked


def test_a_report_that_makes_no_room_asks_the_policy_for_nothing(stage):
    stage.running(num_prompt=10)
    stage.tell(1, report(acked=1, free_blocks=10))
    stage.waiting(8)
    asked = tried(stage)
    stage.tell(1, report(acked=1, free_blocks=9))
    stage.tell(1, report(acked=1, free_blocks=9))
    assert not asked


def test_more_bytes_on_one_worker_are_a_reason_to_try_again(stage):
    stage.running(num_prompt=10)
    stage.tell(1, report(acked=1, free_blocks=10))
    stage.waiting(8)
    assert assigned(stage.tell(1, report(acked=1, free_blocks=11))) == [8]


def test_a_free_seat_is_a_reason_to_try_again_though_bytes_are_fewer(stage):
    record = stage.running(num_prompt=10, max_tokens=2)
    stage.tell(1, report(acked=1, free_blocks=10))
    stage.waiting(8)
    ended = report((7, record.epoch, 1, (6,)), acked=1, free_blocks=9)
    assert assigned(stage.tell(1, ended)) == [8]


def test_whoever_comes_while_others_wait_is_a_reason_to_try_again(stage):
    stage.waiting(8)
    assert assigned(stage.tell(FRONT, Submit(request(9)))) == [8, 9]


def test_after_a_tick_any_report_is_a_reason_to_try_again(stage):
    stage.waiting(8)
    stage.tick()
    assert assigned(stage.tell(1, report())) == [8]
