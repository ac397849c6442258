import itertools

import pytest

from mellmpi.protocol import Cancel, WorkerLost, encode
from mellmpi.transport import ControlPlane, Endpoint, WaitPolicy
from mellmpi.transport.blocks import BlockMover
from mellmpi.transport.blocks.framing import TransferHeader
from mellmpi.transport.endpoint import BUSY_POLL_S
from tests.transport.fakes import FakeBell, FakeChannel
from tests.transport.participant import BLOCK_BYTES, HostArena

LONGEST_S = 0.5


def endpoint(bell=None, spin_s=0.0, all_ring=True):
    channels = FakeChannel(), FakeChannel()
    policy = WaitPolicy(all_ring, longest_s=LONGEST_S, spin_s=spin_s)
    control = ControlPlane(1, 4, channels[0])
    bell = bell or FakeBell()
    return Endpoint(control, channels[1], bell, policy, device_buffers=False), *channels


def test_an_idle_wait_sleeps_for_the_longest_time_and_polls_once_per_sleep():
    bell = FakeBell(rings_at=3)
    idle, control, _ = endpoint(bell, spin_s=0.0)
    idle.wait(60.0)
    assert bell.slept == [LONGEST_S] * 3
    assert control.num_probes == 3 * 2  # two probes each: one alone may make no progress


def test_without_rings_sleeps_double_up_to_the_longest():
    bell = FakeBell(rings_at=20)
    idle, _, _ = endpoint(bell, all_ring=False)
    idle.wait(60.0)
    assert bell.slept[1] == 2 * bell.slept[0] < 1e-3 and bell.slept[-1] == LONGEST_S


def test_a_wait_does_not_spin_again_without_activity():
    bell = FakeBell()
    idle, control, _ = endpoint(bell, spin_s=1e-4)
    idle.wait(60.0)
    probes = control.num_probes
    idle.wait(60.0)
    assert control.num_probes == probes + 2 and len(bell.slept) == 2


def test_a_wait_sleeps_only_shortly_during_a_transfer():
    bell = FakeBell(rings_at=8)
    busy, _, blocks = endpoint(bell)
    busy.attach(HostArena(1))
    busy.receive_blocks(2, 1, [0])
    busy.wait(60.0)
    assert max(bell.slept) <= BUSY_POLL_S and bell.slept[0] < bell.slept[-1]
    blocks.lost.add(2)


def test_a_wait_spins_for_moving_blocks_though_ranks_share_cores(monkeypatch):
    ticks = itertools.count()  # a simulated clock: a loaded machine would skip polls
    monkeypatch.setattr("time.perf_counter", lambda: 1e-4 * next(ticks))
    monkeypatch.setattr("mellmpi.transport.endpoint.MOVING_SPIN_S", 0.05)
    busy, control, _ = endpoint(spin_s=0.0)
    busy.attach(HostArena(1))
    busy.receive_blocks(2, 1, [0])
    busy.wait(60.0)
    probes = control.num_probes
    assert probes > 3 * 2
    busy.wait(60.0)  # no movement
    assert control.num_probes == probes + 2


def test_a_wait_ends_with_a_transfer_and_not_with_each_block():
    bell = FakeBell(rings_at=10**9)
    busy, _, blocks = endpoint(bell)
    blocks.eager = 1
    busy.attach(HostArena(8))
    transfers = [busy.receive_blocks(2, tag, range(4 * tag, 4 * tag + 4)) for tag in (0, 1)]
    for tag in (0, 1):
        blocks.waiting[2, tag].append(bytes(TransferHeader(4, BLOCK_BYTES, False).pack()))
    sleep = bell.sleep

    def a_block_arrives(timeout_s, descriptors=()):
        blocks.waiting[2, 0].append(bytes(BLOCK_BYTES))
        return sleep(timeout_s)

    bell.sleep = a_block_arrives
    busy.wait(60.0)
    assert [t.done for t in transfers] == [True, False] and len(bell.slept) == 4
    blocks.lost.add(2)


def test_a_wait_does_not_sleep_while_blocks_are_being_read(monkeypatch):
    bell, answers = FakeBell(), iter([True] * 50)
    busy, control, _ = endpoint(bell)
    monkeypatch.setattr(BlockMover, "reading", property(lambda _: next(answers, False)))
    busy.wait(60.0)
    assert control.num_probes == 51 * 2 and len(bell.slept) == 1


def test_the_mover_knows_that_poll_calls_mpi(monkeypatch):
    polling, control, _ = endpoint()
    seen = []
    monkeypatch.setattr(polling._mover, "set_polling", seen.append)
    monkeypatch.setattr(control, "take", lambda: seen.append("probe"))
    polling.poll()
    assert seen == [True, "probe", "probe", False]


def test_a_wait_sleeps_only_shortly_while_a_message_is_not_sent():
    bell = FakeBell()
    busy, control, _ = endpoint(bell)
    control.stuck = True
    busy.send(2, Cancel(1, "gone"))
    busy.wait(60.0)
    assert bell.slept[0] <= BUSY_POLL_S and bell.rung == [2]


def test_a_wait_returns_at_once_if_a_message_has_arrived():
    bell = FakeBell()
    ready, control, _ = endpoint(bell)
    control.inbox.append((2, encode(Cancel(5, "gone"))))
    ready.wait(60.0)
    assert bell.slept == [] and ready.poll() == [(2, Cancel(5, "gone"))]


def test_the_report_of_a_lost_worker_is_the_last_message_from_it():
    survivor, control, blocks = endpoint()
    survivor.attach(HostArena(1))
    transfer = survivor.receive_blocks(2, 1, [0])
    control.inbox.append((2, encode(Cancel(1, "gone"))))
    control.failures, control.lost, blocks.lost = [2], {2}, {2}
    assert survivor.poll() == [(2, Cancel(1, "gone")), (2, WorkerLost(2))]
    control.inbox.append((2, encode(Cancel(2, "gone"))))
    survivor.send(2, Cancel(3, "gone"))
    assert survivor.poll() == [] and survivor.lost == {2}
    assert transfer.done and transfer.failed and not control.pending("send")


def test_the_last_messages_of_a_dead_worker_precede_the_report_of_its_loss():
    survivor, control, _ = endpoint()
    control.failures, control.last_messages = [2], [(2, encode(Cancel(1, "gone")))]
    assert survivor.poll() == [(2, Cancel(1, "gone")), (2, WorkerLost(2))]


def test_nothing_is_sent_to_a_lost_worker():
    survivor, control, _ = endpoint()
    control.failures = [2]
    survivor.poll()
    survivor.send(2, Cancel(3, "gone"))
    assert not control.requests


def test_an_error_is_raised_if_no_loss_explains_it_in_time(monkeypatch):
    troubled, control, _ = endpoint()
    control.error = RuntimeError("the link is broken")
    troubled.poll()
    monkeypatch.setattr("mellmpi.transport.control_plane.SUSPICION_S", 0.0)
    with pytest.raises(RuntimeError, match="the link is broken"):
        troubled.poll()


def test_an_error_that_a_loss_explains_is_ignored(monkeypatch):
    monkeypatch.setattr("mellmpi.transport.control_plane.SUSPICION_S", 0.0)
    survivor, control, _ = endpoint()
    control.error, control.failures = RuntimeError("reset by peer"), [3]
    assert survivor.poll() == [(3, WorkerLost(3))] and survivor.poll() == []
