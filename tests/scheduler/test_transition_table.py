"""One test for each row of the transition table of docs/design.md."""

from dataclasses import replace

import pytest

from mellmpi.protocol import (
    FRONT,
    OBSERVER,
    Assign,
    Cancel,
    Emit,
    KvFailed,
    KvRefused,
    KvReserved,
    MigrationEnded,
    ReceiveKv,
    Release,
    SendKv,
    Submit,
    Unfreeze,
    WorkerLost,
)
from mellmpi.scheduler import MoveProposal
from mellmpi.scheduler.requests import ALLOWED, Record, State
from tests.scheduler.stage import Stage, of_type, received, report, request, to_workers

EPOCH = 1  # of the first assignment of a stage
OFFER = 2  # of the offer that follows it
RELEASE_OWNER, RELEASE_DST = (1, Release(7, EPOCH)), (2, Release(7, OFFER))
UNFREEZE = (1, Unfreeze(7, EPOCH))


@pytest.fixture
def stage():
    return Stage()


def outcome(commands):
    """The outcome of the migration that these commands end; None if they end none."""
    ended = of_type(commands, MigrationEnded)
    assert len(ended) <= 1
    return ended[0].outcome if ended else None


def test_waiting_room_found_becomes_running_by_assign(stage):
    commands = stage.handle(FRONT, Submit(request(7)))
    assert to_workers(commands) == [(1, Assign(request(7), EPOCH, ()))]
    assert stage.scheduler.records[7].state is State.RUNNING


def test_running_policy_transfer_becomes_reserving_by_receive_kv(stage):
    record = stage.running()
    commands = stage.tick(MoveProposal(7, 2, "test", "transfer"))
    order = ReceiveKv(record.request, OFFER, src=1, num_logged=1, num_tokens=4, start=0, outputs=())
    assert to_workers(commands) == [(2, order)]
    assert record.state is State.RESERVING


def test_running_policy_recompute_waits_for_the_preferred_worker_and_the_owner_is_released(stage):
    record = stage.running()
    commands = stage.tick(MoveProposal(7, 2, "test", "recompute"))
    assert to_workers(commands) == [RELEASE_OWNER, (2, Assign(record.request, 2, (5,)))]
    assert [line for line in record.transitions if "running -> waiting" in line]
    assert (record.state, record.worker) == (State.RUNNING, 2)


def test_reserving_kv_reserved_becomes_sending_by_send_kv(stage):
    record = stage.reserving()
    commands = stage.handle(2, KvReserved(7, OFFER, 0))
    assert commands == [(1, SendKv(7, EPOCH, dst=2, dst_epoch=OFFER, start=0))]
    assert record.state is State.SENDING


def test_reserving_kv_refused_becomes_running_without_a_command(stage):
    record = stage.reserving()
    commands = stage.handle(2, KvRefused(7, OFFER))
    assert to_workers(commands) == [] and outcome(commands) == "refused"
    assert (record.state, record.worker, record.epoch) == (State.RUNNING, 1, EPOCH)


def test_sending_kv_received_becomes_running_at_dst_and_the_source_is_released(stage):
    record = stage.sending()
    commands = stage.handle(2, received(record))
    assert to_workers(commands) == [RELEASE_OWNER] and outcome(commands) == "moved"
    assert (record.state, record.worker, record.epoch) == (State.RUNNING, 2, OFFER)


def test_sending_kv_failed_becomes_running_at_src_by_unfreeze(stage):
    record = stage.sending()
    commands = stage.handle(2, KvFailed(7, OFFER, "checksum"))
    assert to_workers(commands) == [UNFREEZE] and outcome(commands) == "failed: checksum"
    assert (record.state, record.worker, record.epoch) == (State.RUNNING, 1, EPOCH)


PREEMPTED = report(preempted=((7, EPOCH),))


@pytest.mark.parametrize(
    ("state", "released"),
    [("running", []), ("reserving", [RELEASE_DST]), ("sending", [RELEASE_DST])],
)
def test_preempted_by_its_owner_it_waits_and_the_destination_is_released(stage, state, released):
    record = getattr(stage, state)()
    stage.place_at = None
    commands = stage.handle(1, PREEMPTED)
    assert to_workers(commands) == released
    assert outcome(commands) == ("preempted" if released else None)
    assert record.state is State.WAITING


@pytest.mark.parametrize(
    ("state", "released"),
    [("running", []), ("reserving", [RELEASE_DST]), ("sending", [RELEASE_DST])],
)
def test_its_owner_lost_it_waits_and_the_destination_is_released(stage, state, released):
    record = getattr(stage, state)()
    stage.place_at = None
    commands = stage.handle(1, WorkerLost(1))
    assert to_workers(commands) == released
    assert outcome(commands) == ("worker 1 lost" if released else None)
    assert record.state is State.WAITING


@pytest.mark.parametrize(("state", "unfrozen"), [("reserving", []), ("sending", [UNFREEZE])])
def test_its_destination_lost_it_runs_on_and_is_unfrozen_if_it_was_sending(stage, state, unfrozen):
    record = getattr(stage, state)()
    commands = stage.handle(2, WorkerLost(2))
    assert to_workers(commands) == unfrozen and outcome(commands) == "worker 2 lost"
    assert (record.state, record.worker, record.epoch) == (State.RUNNING, 1, EPOCH)


@pytest.mark.parametrize(
    ("state", "released"),
    [("running", []), ("reserving", [RELEASE_DST]), ("sending", [RELEASE_DST])],
)
def test_with_the_last_token_it_is_gone_and_the_destination_is_released(stage, state, released):
    record = getattr(stage, state)(max_tokens=2)
    commands = stage.handle(1, report((7, EPOCH, 1, (6,))))
    assert of_type(commands, Emit) == [Emit(7, 1, (6,), (), "length", ())]
    assert to_workers(commands) == released
    assert stage.state(record) is None


@pytest.mark.parametrize(
    ("state", "released"),
    [
        ("waiting", []),
        ("running", [RELEASE_OWNER]),
        ("reserving", [RELEASE_OWNER, RELEASE_DST]),
        ("sending", [RELEASE_OWNER, RELEASE_DST]),
    ],
)
def test_cancelled_it_is_gone_and_owner_and_destination_are_released(stage, state, released):
    record = getattr(stage, state)()
    commands = stage.handle(FRONT, Cancel(7, "gone"))
    assert to_workers(commands) == released
    assert [command for to, command in commands if to not in (1, 2, OBSERVER)] == []
    assert stage.state(record) is None


# --- events without a row ------------------------------------------------------------------------

ANSWERS = [KvReserved(7, 0, 0), KvRefused(7, 0), KvFailed(7, 0, "x"), "received"]
EXPECTED = {
    ("reserving", KvReserved),
    ("reserving", KvRefused),
    ("sending", KvFailed),
    ("sending", "received"),
}


def answer(record: Record, kind, epoch: int):
    event = received(record) if kind == "received" else kind
    return replace(event, epoch=epoch)


@pytest.mark.parametrize("state", ["reserving", "sending"])
@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_that_does_not_fit_the_offer_raises_with_the_transitions(stage, state, kind):
    record = getattr(stage, state)()
    if (state, kind if kind == "received" else type(kind)) in EXPECTED:
        return
    with pytest.raises(RuntimeError, match="offered to 2 under 2"):
        stage.handle(2, answer(record, kind, OFFER))


@pytest.mark.parametrize("kind", [KvReserved(7, 0, 0), KvRefused(7, 0), KvFailed(7, 0, "x")])
def test_an_answer_under_the_owners_own_epoch_raises_with_the_transitions(stage, kind):
    record = stage.sending()
    stage.handle(2, received(record))
    with pytest.raises(RuntimeError, match="received by 2"):
        stage.handle(2, replace(kind, epoch=OFFER))


@pytest.mark.parametrize("state", ["waiting", "running", "reserving", "sending"])
@pytest.mark.parametrize("kind", [KvReserved(7, 99, 0), KvRefused(7, 99), KvFailed(7, 99, "x")])
def test_an_answer_under_a_stale_epoch_is_dropped(stage, state, kind):
    record = getattr(stage, state)()
    stage.place_at = None
    before = record.state
    assert stage.handle(3, kind) == [] and record.state is before


def test_a_run_under_a_stale_epoch_is_dropped(stage):
    record = stage.sending()
    stage.handle(2, received(record))
    assert stage.handle(1, report((7, EPOCH, 1, (6, 7)))) == []
    assert record.log.tokens == [5]


def test_a_preemption_under_a_stale_epoch_is_dropped(stage):
    record = stage.running()
    stage.tick(MoveProposal(7, 2, "test", "recompute"))
    assert stage.handle(1, PREEMPTED) == []
    assert (record.state, record.worker) == (State.RUNNING, 2)


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("after", State)
def test_a_state_changes_only_as_the_table_allows(before, after):
    record = Record(request(7), arrival_s=0.0, slot=0, state=before)
    if after in ALLOWED[before]:
        record.move(after, "test")
        assert record.state is after
    else:
        with pytest.raises(RuntimeError, match=f"{before.value} -> {after.value}"):
            record.move(after, "test")
