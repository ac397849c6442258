"""Transfers of blocks that the receiver reads out of the sender's memory."""

import ctypes
import math

import numpy as np
import pytest

from mellmpi.transport.blocks import BlockMover, Staged, checksum
from mellmpi.transport.blocks.framing import TransferHeader, pack_numbers
from mellmpi.transport.blocks.staging import InPlace
from tests.transport.block_messages import HALF, complete_sends, progress_until_done
from tests.transport.fakes import DelayedCopies, FakeChannel
from tests.transport.memory_areas import PID, SMALL_BLOCK_BYTES, addresses
from tests.transport.participant import HostArena

ANSWER = b"x"


@pytest.fixture
def channel():
    return FakeChannel()


@pytest.fixture
def mover(channel, target):
    """Peer 1 uses checksums; peers 1 and 2 read our memory."""
    mover = BlockMover(channel, checked=lambda peer: peer == 1, read_by=lambda peer: peer < 3)
    mover.attach(InPlace(target))
    yield mover
    mover.close()
    assert not channel.pending("receive")


def deliver_header(channel, src, arena, ids, checked=False, pid=PID, sums=None):
    header = TransferHeader(len(ids), arena.block_bytes, checked, pid, addresses(arena, ids))
    channel.waiting[src, 5].append(bytes(header.pack()))
    if checked:
        sums = sums or [checksum(memoryview(arena.blocks[i])) for i in ids]
        channel.waiting[src, 5].append(bytes(pack_numbers(sums)))


def sent(channel):
    return [(r.tag, ctypes.string_at(r.address, r.num_bytes)) for r in channel.pending("send")]


# --- receives that read memory -------------------------------------------------------------------


@pytest.mark.parametrize("src", [1, 2])  # with checksums, and without
def test_blocks_are_read_to_the_right_places_and_the_sender_gets_an_answer(
    channel, mover, target, source, src
):
    transfer = mover.receive(src, 5, [9, 2, 7])
    deliver_header(channel, src, source, [0, 4, 15], checked=src == 1)
    for _ in range(20):
        mover.progress()
    assert [tag for tag, _ in sent(channel)] == [5 + HALF] and not transfer.done
    complete_sends(channel)
    progress_until_done(mover, transfer)
    assert not transfer.failed and transfer.num_bytes == 3 * SMALL_BLOCK_BYTES
    assert np.array_equal(target.blocks[[9, 2, 7]], source.blocks[[0, 4, 15]])


def test_a_wrong_checksum_fails_the_transfer(channel, mover, source):
    transfer = mover.receive(1, 5, range(3))
    deliver_header(channel, 1, source, range(3), checked=True, sums=[1, 2, 3])
    mover.progress()
    complete_sends(channel)
    progress_until_done(mover, transfer)
    assert transfer.reason == "checksum"


@pytest.mark.parametrize(
    ("num_blocks", "block_bytes", "reason"),
    [
        (2, SMALL_BLOCK_BYTES, "truncated"),
        (4, SMALL_BLOCK_BYTES, "size"),
        (3, SMALL_BLOCK_BYTES + 8, "size"),
    ],
)
def test_a_header_that_does_not_match_the_receive_is_answered_without_reading(
    channel, mover, target, num_blocks, block_bytes, reason
):
    other = HostArena(4, block_bytes)
    other.fill(1)
    transfer = mover.receive(2, 5, range(3))
    deliver_header(channel, 2, other, range(num_blocks))
    mover.progress()
    assert len(sent(channel)) == 1
    complete_sends(channel)
    progress_until_done(mover, transfer)
    assert transfer.reason == reason and not target.blocks.any()


def test_a_drain_answers_and_reads_nothing(channel, mover, target, source):
    transfer = mover.drain(1, 5, 3)
    deliver_header(channel, 1, source, range(3), checked=True)
    mover.progress()
    complete_sends(channel)
    progress_until_done(mover, transfer)
    assert not transfer.failed and not channel.waiting[1, 5] and not target.blocks.any()


def test_a_dead_process_is_a_lost_peer(channel, mover, source, dead_pid):
    transfer = mover.receive(2, 5, range(3))
    deliver_header(channel, 2, source, range(3), pid=dead_pid)
    mover.progress()
    complete_sends(channel)
    progress_until_done(mover, transfer)
    assert transfer.reason == "peer lost"


def test_a_peer_lost_during_a_read_ends_the_transfer(channel, mover, source):
    transfer = mover.receive(2, 5, range(3))
    deliver_header(channel, 2, source, range(3))
    mover._round(mover._transfers)  # adds the read without copying a piece
    assert mover._reads and not transfer.done
    channel.lost.add(2)
    mover.drop_peer(2)
    assert transfer.done and transfer.reason == "peer lost" and not mover._reads


def test_a_burst_of_messages_ends_when_there_is_something_to_read(
    channel, mover, source, monkeypatch
):
    mover.receive(2, 5, range(3))
    deliver_header(channel, 2, source, range(3))
    rounds, drive = [], mover._round
    monkeypatch.setattr(mover, "_round", lambda moves: rounds.append(0) or drive(moves))
    assert mover._burst(math.inf) == {2} and len(rounds) == 1
    assert mover._burst(math.inf) == set()


def test_transfers_of_one_tag_are_answered_in_their_order(channel, mover, source):
    """Otherwise the sender would take the second answer for the first one."""
    first, second = mover.receive(2, 5, range(3)), mover.receive(2, 5, range(3, 6))
    deliver_header(channel, 2, source, range(3))
    deliver_header(channel, 2, source, range(3))
    mover._round(mover._transfers)
    assert not sent(channel) and len(channel.waiting[2, 5]) == 1
    for _ in range(5):
        mover.progress()
        complete_sends(channel)
    assert first.done and second.done and not second.failed


def test_a_read_into_a_device_uses_few_slots(channel, target, source, monkeypatch):
    monkeypatch.setattr("mellmpi.transport.blocks.receiving.window", lambda _: 3)
    copies = DelayedCopies(target)
    mover = BlockMover(channel)
    mover.attach(Staged(SMALL_BLOCK_BYTES, copies))
    transfer = mover.receive(2, 5, range(16))
    deliver_header(channel, 2, source, range(16))
    for _ in range(50):
        mover.progress()
        complete_sends(channel)
    assert transfer.done and not transfer.failed and len(copies.slots) == 3
    assert np.array_equal(target.blocks, source.blocks)


# --- sends that the peer reads --------------------------------------------------------------------


def test_the_header_has_the_addresses_and_the_answer_ends_the_transfer(channel, mover, target):
    transfer = mover.send(2, 5, [4, 1])
    ((tag, data),) = sent(channel)
    assert (tag, TransferHeader.unpack(data)) == (
        5,
        TransferHeader(2, SMALL_BLOCK_BYTES, False, PID, addresses(target, [4, 1])),
    )
    complete_sends(channel)
    mover.progress()
    assert not transfer.done
    channel.waiting[2, 5 + HALF].append(ANSWER)
    mover.progress()
    assert transfer.done and transfer.num_bytes == 2 * SMALL_BLOCK_BYTES


def test_checksums_are_computed_a_window_at_a_time(channel, mover, target, monkeypatch):
    monkeypatch.setattr("mellmpi.transport.blocks.sending.window", lambda _: 2)
    target.fill(5)
    expected = [checksum(memoryview(target.blocks[i])) for i in range(5)]
    transfer = mover.send(1, 5, range(5))
    assert len(sent(channel)) == 1
    channel.waiting[1, 5 + HALF].append(ANSWER)
    for _ in range(3):
        mover.progress()
    assert sent(channel)[-1] == (5, bytes(pack_numbers(expected)))
    complete_sends(channel)
    progress_until_done(mover, transfer)


def test_an_answer_never_ends_a_receive_of_the_same_tag(channel, mover, source):
    send, receive = mover.send(2, 5, range(3)), mover.receive(2, 5, range(4, 7))
    channel.waiting[2, 5 + HALF].append(ANSWER)
    complete_sends(channel)
    progress_until_done(mover, send)
    assert not receive.done
    deliver_header(channel, 2, source, range(3))
    for _ in range(5):
        mover.progress()
        complete_sends(channel)
    assert receive.done and not receive.failed


def test_the_loss_of_the_reader_fails_the_transfer(channel, mover):
    transfer = mover.send(2, 5, range(3))
    complete_sends(channel)
    channel.lost.add(2)
    mover.drop_peer(2)
    assert transfer.done and transfer.reason == "peer lost" and not transfer.num_bytes


def test_close_does_not_wait_for_the_answer(channel, mover):
    transfer = mover.send(2, 5, range(3))
    complete_sends(channel)
    mover.close()
    assert transfer.done and transfer.failed and not mover.busy


def test_slots_of_a_device_are_sent_as_messages(channel, target):
    mover = BlockMover(channel, read_by=lambda _: True)
    mover.attach(Staged(SMALL_BLOCK_BYTES, DelayedCopies(target)))
    mover.send(2, 5, range(3))
    assert TransferHeader.unpack(sent(channel)[0][1]).pid is None and len(sent(channel)) == 4
