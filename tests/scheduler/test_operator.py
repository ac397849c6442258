"""Commands of an operator: held workers, and single moves."""

import pytest

from mellmpi.protocol import (
    FRONT,
    Assign,
    DrainWorker,
    KvReserved,
    MigrationStarted,
    ModelKv,
    MoveRequest,
    OperatorAnswer,
    Park,
    Parked,
    ReceiveKv,
    Rejected,
    Submit,
    UndrainWorker,
    Wake,
    WorkerLost,
    WorkerReady,
)
from mellmpi.scheduler import ClusterScheduler, WorkerState
from mellmpi.scheduler.requests import State
from mellmpi.scheduler.view import Drain, MoveProposal, ParkWorker, WakeWorker
from tests.scheduler.stage import (
    KV,
    MAX_SEQS,
    NUM_BLOCKS,
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


def placed(stage, request_id=1, **kwargs):
    """A request without a token so far: it moves by transfer. Returns its record."""
    return stage.running(request_id, tokens=(), **kwargs)


def give(stage, command):
    """Give a command; return its error and the commands to workers."""
    commands = stage.handle(FRONT, command)
    (answer,) = of_type(commands, OperatorAnswer)
    assert answer.asked == command
    return answer.error, to_workers(commands)


def drain(stage, worker=1):
    error, commands = give(stage, DrainWorker(worker))
    assert error == ""
    return commands


def undrain(stage, worker=1):
    error, commands = give(stage, UndrainWorker(worker))
    assert error == ""
    return commands


def state(stage, worker=1):
    return WorkerState(int(stage.scheduler.registry.ledger.state[worker]))


def finish_move(stage, record):
    """Let the destination of the request's handover receive its KV."""
    stage.handle(record.offer.dst, KvReserved(record.request.id, record.offer.epoch, 0))
    return stage.handle(record.offer.dst, received(record, first=len(record.log.tokens)))


def park(stage, worker):
    stage.tick(ParkWorker(worker))
    stage.handle(worker, Parked(acked=1))
    assert state(stage, worker) is WorkerState.PARKED


# --- drain ---------------------------------------------------------------------------------------


def test_the_requests_of_a_drained_worker_move_away_and_it_parks(stage):
    first, second = placed(stage, 1), placed(stage, 2)
    commands = drain(stage)
    assert {type(c) for _, c in commands} == {ReceiveKv} and len(commands) == 2
    for record in (first, second):
        finish_move(stage, record)
        assert record.worker in (2, 3) and record.state is State.RUNNING
    assert state(stage) is WorkerState.PARKING
    stage.handle(1, Parked(acked=9))
    assert state(stage) is WorkerState.HELD_PARKED


def test_an_idle_worker_parks_at_once(stage):
    assert drain(stage, 3) == [(3, Park())]


def test_nothing_is_placed_on_a_drained_worker(stage):
    drain(stage)
    hosting = stage.scheduler.registry.ledger.hosting(KV.model)
    assert hosting.tolist() == [False, False, True, True]


def test_no_policy_wakes_or_undrains_a_held_worker(stage):
    placed(stage, 1, num_prompt=70)  # fits on an empty worker only
    stage.place_at = 2
    placed(stage, 2), placed(stage, 3)
    stage.place_at = 3
    placed(stage, 4, num_prompt=40)
    drain(stage)
    for proposal in (WakeWorker(1), Drain(1), ParkWorker(1)):
        stage.tick(proposal)
        assert state(stage) is WorkerState.HELD
    assert not of_type(stage.tick(MoveProposal(2, 1, "test", "transfer")), ReceiveKv)
    drain(stage, 3)
    park_held = stage.tick(WakeWorker(3))
    assert not of_type(park_held, Wake)


def test_a_drain_is_repeatable(stage):
    placed(stage, 1)
    assert drain(stage) and drain(stage) == []


def test_a_parked_worker_is_held_at_once_and_stays_parked(stage):
    park(stage, 2)
    assert drain(stage, 2) == [] and state(stage, 2) is WorkerState.HELD_PARKED
    assert not of_type(stage.tick(WakeWorker(2)), Wake)
    undrain(stage, 2)
    assert state(stage, 2) is WorkerState.PARKED
    assert of_type(stage.tick(WakeWorker(2)), Wake)


def test_a_worker_that_wakes_is_held_when_it_is_ready(stage):
    park(stage, 2)
    stage.tick(WakeWorker(2))
    drain(stage, 2)
    assert state(stage, 2) is WorkerState.WAKING
    assert to_workers(stage.ready(2, acked=2)) == [(2, Park())]


def test_a_worker_that_parks_is_held_when_it_has_parked(stage):
    stage.tick(ParkWorker(2))
    drain(stage, 2)
    stage.handle(2, Parked(acked=1))
    assert state(stage, 2) is WorkerState.HELD_PARKED


def test_a_worker_drained_before_it_starts_parks_when_it_is_ready():
    stage = Stage(2)
    started = stage.scheduler
    stage.scheduler = ClusterScheduler(2, started.config, started.placement.policy)
    drain(stage)
    assert to_workers(stage.ready(1)) == [(1, Park())]


def test_an_undrained_worker_takes_requests_again(stage):
    placed(stage, 1, num_prompt=70)
    for worker in (2, 3):
        stage.place_at = worker
        placed(stage, worker, num_prompt=20)
    drain(stage)
    assert state(stage) is WorkerState.HELD  # nobody has room
    undrain(stage)
    assert state(stage) is WorkerState.ACTIVE and not stage.scheduler.registry.ledger.held.any()


def test_requests_pinned_to_a_drained_worker_resume_elsewhere(stage):
    policy = stage.scheduler.placement.policy
    object.__setattr__(policy, "resumes_at_home", True)
    record = placed(stage, 1)
    preempted = report(free_blocks=0, preempted=((1, record.epoch),))
    stage.handle(1, preempted)
    assert stage.scheduler.queue.pinning_workers() == [1]
    stage.place_at = 2
    assert [to for to, command in drain(stage) if isinstance(command, Assign)] == [2]


def test_a_request_preempted_by_a_held_worker_is_not_pinned(stage):
    object.__setattr__(stage.scheduler.placement.policy, "resumes_at_home", True)
    record = fill_others(stage)
    drain(stage)
    stage.place_at = None
    stage.handle(1, report(free_blocks=0, preempted=((record.request.id, record.epoch),)))
    assert record.state is State.WAITING and not stage.scheduler.queue.pinning_workers()


def fill_others(stage, request_id=1):
    """A request on worker 1; workers 2 and 3 have no room for it. Returns its record."""
    record = placed(stage, request_id, num_prompt=40)
    for worker in (2, 3):
        stage.place_at = worker
        placed(stage, 10 + worker, num_prompt=50)
    stage.place_at = 1
    return record


def test_without_room_a_parked_worker_is_woken(stage):
    park(stage, 3)
    record = placed(stage, 1, num_prompt=40)
    stage.place_at = 2
    placed(stage, 2, num_prompt=50)
    assert [(to, type(c)) for to, c in drain(stage)] == [(3, Wake)]
    assert stage.tick() == []  # one is enough
    assert [(to, type(c)) for to, c in to_workers(stage.ready(3, acked=2))] == [(3, ReceiveKv)]
    assert record.state is State.RESERVING


def test_without_room_a_draining_worker_with_room_becomes_active(stage):
    park(stage, 3)
    placed(stage, 1, num_prompt=40)
    stage.place_at = 2
    placed(stage, 2)
    stage.tick(Drain(2))
    assert [(to, type(c)) for to, c in drain(stage)] == []
    assert state(stage, 2) is WorkerState.ACTIVE
    assert of_type(stage.tick(), ReceiveKv)


def test_with_no_worker_to_wake_its_requests_wait_for_room_but_go_before_the_queue(stage):
    record = fill_others(stage)
    assert drain(stage) == [] and record.state is State.RUNNING
    stage.waiting(5, num_prompt=40)
    stage.place_at = 2
    other = stage.scheduler.records[12]
    commands = stage.handle(2, report((12, other.epoch, 0, tuple(range(10))), acked=1))
    assert [type(c) for _, c in to_workers(commands)][:1] == [ReceiveKv]
    assert record.state is State.RESERVING and record.offer.dst == 2


def test_the_smallest_request_moves_first(stage):
    big, small = placed(stage, 1, num_prompt=40), placed(stage, 2, num_prompt=8)
    for worker, num_prompt in ((2, 60), (3, 52)):
        stage.place_at = worker
        placed(stage, 10 + worker, num_prompt=num_prompt)
    drain(stage)
    assert (big.state, small.state) == (State.RUNNING, State.RESERVING)


def test_requests_of_one_round_share_the_room(stage):
    for worker in (2, 3):
        stage.place_at = worker
        placed(stage, 10 + worker, num_prompt=40)
    stage.place_at = 1
    records = [placed(stage, i, num_prompt=20) for i in (1, 2, 3)]
    drain(stage)
    assert sorted(r.offer.dst for r in records if r.offer) == [2, 3]


def test_a_destination_keeps_a_block_for_each_of_its_requests(stage):
    stage.place_at = 3
    placed(stage, 3, num_prompt=79, max_tokens=1)
    stage.place_at = 2
    placed(stage, 2, num_prompt=38)  # with the first token, 10 of 20 blocks
    stage.place_at = 1
    record = placed(stage, 1, num_prompt=39)
    assert drain(stage) == [] and record.state is State.RUNNING


def test_a_request_whose_only_worker_is_held_waits(stage):
    for worker in (2, 3):
        drain(stage, worker)
    drain(stage, 1)
    stage.place_at = None
    commands = stage.handle(FRONT, Submit(request(1)))
    assert not of_type(commands, Rejected) and stage.scheduler.records[1].state is State.WAITING
    for worker in (1, 2, 3):
        stage.handle(worker, Parked(acked=1))
    stage.tick()
    assert not of_type(stage.tick(), Wake)  # however long it waits
    assert of_type(stage.handle(FRONT, UndrainWorker(2)), Wake)


def test_a_held_worker_may_be_lost(stage):
    record = fill_others(stage)
    drain(stage)
    stage.place_at = None
    stage.handle(1, WorkerLost(1))
    assert record.state is State.WAITING and not stage.scheduler.registry.ledger.held.any()
    stage.tick()


def test_a_request_on_its_way_to_a_worker_that_is_drained_moves_on(stage):
    record = stage.sending(dst=2, tokens=())
    drain(stage, 2)
    assert state(stage, 2) is WorkerState.HELD
    stage.handle(2, received(record))
    assert record.worker == 2
    stage.handle(2, report((7, record.epoch, 0, (5,))))
    stage.tick()
    assert record.offer is not None and record.offer.dst in (1, 3)


def test_a_held_worker_leaves_nothing_behind(stage):
    record = placed(stage, 1)
    drain(stage)
    finish_move(stage, record)
    stage.handle(record.worker, report((1, record.epoch, 0, tuple(range(10))), acked=1))
    assert_nothing_left(stage.scheduler)


# --- moves ---------------------------------------------------------------------------------------


def test_a_request_moves_in_the_cheapest_mode(stage):
    record = placed(stage, 7)
    commands = stage.handle(FRONT, MoveRequest(7, 2))
    (started,) = of_type(commands, MigrationStarted)
    assert (started.src, started.dst, started.reason) == (1, 2, "operator")
    assert record.offer.dst == 2 and of_type(commands, OperatorAnswer)[0].error == ""


def test_a_move_longer_than_the_limit_of_policies_starts_at_once(stage):
    placed(stage, 1), placed(stage, 2)
    object.__setattr__(stage.scheduler.config, "migration_limit_s", 1e-9)
    for request_id in (1, 2):
        assert give(stage, MoveRequest(request_id, 2))[0] == ""


# --- refusals ------------------------------------------------------------------------------------


def lost(stage):
    stage.running()
    stage.handle(2, WorkerLost(2))


def waiting(stage):
    stage.waiting()
    stage.place_at = None


def moving(stage):
    stage.reserving(dst=3)


def recomputing(stage):
    stage.running()
    stage.tick(MoveProposal(7, 3, "test", "recompute"))


def full(stage):
    stage.place_at = 2
    stage.running(1, num_prompt=75, tokens=(), max_tokens=1)
    stage.place_at = 1
    stage.running(num_prompt=5)


def without_slots(stage):
    stage.place_at = 2
    for i in range(1, MAX_SEQS + 1):
        stage.running(20 + i, num_prompt=1)
    stage.place_at = 1
    stage.running()


def other_model(stage):
    stage.running()
    kv = ModelKv("other", 4, 10)
    ready = WorkerReady((kv,), NUM_BLOCKS * 10, MAX_SEQS, 2, 0.5, 64, None, (), "")
    park(stage, 2)
    stage.tick(WakeWorker(2))
    stage.handle(2, ready)
    stage.scheduler.registry.ledger._able[KV.model][2] = False
    stage.scheduler.registry.ledger._hosting.clear()


def returning(stage):
    object.__setattr__(stage.scheduler.placement.policy, "resumes_at_home", True)
    stage.place_at = 2
    record = stage.running(1)
    stage.handle(2, report(free_blocks=0, preempted=((1, record.epoch),)))
    stage.place_at = 1
    stage.running()


def failed(stage):
    record = stage.running(tokens=())
    record.transfer_failed = True


MOVE = MoveRequest(7, 2)
REFUSALS = [
    (lambda stage: None, DrainWorker(7), "there is no worker 7; workers are 1 to 3"),
    (lambda stage: None, UndrainWorker(0), "there is no worker 0; workers are 1 to 3"),
    (lambda stage: None, MoveRequest(7, -1), "there is no worker -1; workers are 1 to 3"),
    (lost, DrainWorker(2), "worker 2 is lost"),
    (lost, UndrainWorker(2), "worker 2 is lost"),
    (lost, MOVE, "worker 2 is lost"),
    (lambda stage: None, UndrainWorker(2), "worker 2 is not drained"),
    (
        lambda stage: (stage.running(), drain(stage, 2), drain(stage, 3)),
        DrainWorker(1),
        "worker 1 is the last one that can serve m, which has live requests; it cannot be drained",
    ),
    (lambda stage: None, MOVE, "request 7 has ended, or never began"),
    (waiting, MOVE, "request 7 is on no worker: it waits"),
    (moving, MOVE, "request 7 is already moving"),
    (recomputing, MOVE, "request 7 is already moving"),
    (lambda stage: stage.running(), MoveRequest(7, 1), "request 7 is already on worker 1"),
    (lambda stage: (stage.running(), drain(stage, 2)), MOVE, "worker 2 is drained"),
    (lambda stage: (stage.running(), park(stage, 2)), MOVE, "worker 2 is parked"),
    (other_model, MOVE, "worker 2 does not serve m"),
    (
        returning,
        MOVE,
        "worker 2 takes back requests that it has preempted, and no others before",
    ),
    (full, MOVE, "worker 2 has no room: the request needs 20 bytes, it has 10"),
    (without_slots, MOVE, "worker 2 has no room: it runs 8 requests, as many as it can"),
    (failed, MOVE, "the last move of request 7 failed; try again after its next token"),
]


@pytest.mark.parametrize(("prepare", "command", "error"), REFUSALS, ids=[e for *_, e in REFUSALS])
def test_a_command_that_is_impossible_is_refused_and_changes_nothing(
    stage, prepare, command, error
):
    prepare(stage)
    before = stage.scheduler.registry.ledger.state.tolist()
    assert give(stage, command) == (error, [])
    assert stage.scheduler.registry.ledger.state.tolist() == before


def test_the_last_active_worker_is_drained_if_another_can_be_woken(stage):
    record = placed(stage, 1)
    for worker in (2, 3):
        park(stage, worker)
    assert [(to, type(c)) for to, c in drain(stage)] == [(2, Wake)]
    stage.ready(2, acked=2)
    assert record.offer.dst == 2
