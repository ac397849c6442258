"""Transfers of blocks in place, without checksums."""

import numpy as np
import pytest

from mellmpi.transport.blocks import BlockMover
from mellmpi.transport.blocks.staging import InPlace
from tests.transport.block_messages import (
    BLOCK_BYTES,
    HALF,
    WINDOW,
    answer,
    complete_sends,
    deliver,
    header,
    progress_until_done,
)
from tests.transport.participant import HostArena


def test_the_clock_of_a_receive_starts_with_its_first_message(channel, mover):
    transfer = mover.receive(1, 5, range(2))
    mover.progress()
    awaited_s = transfer.started_s
    deliver(channel, 1, 5, 2)
    progress_until_done(mover, transfer)
    assert transfer.started_s > awaited_s and transfer.elapsed_s > 0


def test_receives_are_posted_a_window_at_a_time(channel, mover, arena):
    deliver(channel, 1, 5, 16)
    transfer = mover.receive(1, 5, range(16))
    assert not channel.requests  # posting may copy, so only progress does it
    blocks = [channel.waiting[1, 5].pop() for _ in range(16)]
    assert mover.progress() == [1] and len(channel.pending("receive")) == WINDOW
    channel.waiting[1, 5].append(blocks.pop())
    assert mover.progress() == [1] and len(channel.pending("receive")) == WINDOW
    channel.waiting[1, 5].extend(reversed(blocks))
    while not transfer.done:
        assert mover.progress() == [1]
    assert (arena.blocks[:, 0] == np.arange(1, 17)).all() and not transfer.failed


def test_no_receive_is_posted_before_the_header(channel, mover):
    mover.receive(1, 5, range(16))
    mover.drain(1, 6, 16)
    mover.progress()
    assert not channel.requests


def test_sends_from_the_arena_are_posted_at_once(channel, mover):
    transfer = mover.send(1, 5, range(16))
    assert len(channel.pending("send")) == 16 + 1 and not transfer.done


def test_a_send_ends_with_the_answer_of_the_receiver(channel, mover):
    transfer = mover.send(1, 5, range(16))
    complete_sends(channel)
    mover.progress()
    assert transfer.num_bytes == 16 * BLOCK_BYTES and not transfer.done
    answer(channel, 1, 5)
    mover.progress()
    assert transfer.done and not transfer.failed


def test_a_receive_and_a_drain_answer_after_the_last_block(channel, mover):
    channel.eager = 0
    mover.receive(1, 5, range(3))
    mover.drain(1, 6, 3)
    for tag in (5, 6):
        deliver(channel, 1, tag, 3)
    last = [channel.waiting[1, tag].pop() for tag in (5, 6)]
    for _ in range(9):
        mover.progress()
    assert not channel.pending("send")
    for tag, block in zip((5, 6), last, strict=True):
        channel.waiting[1, tag].append(block)
    for _ in range(9):
        mover.progress()
    assert [(r.tag, r.num_bytes) for r in channel.pending("send")] == [(5 + HALF, 1), (6 + HALF, 1)]
    complete_sends(channel)
    mover.progress()


def test_close_does_not_wait_for_the_answer_to_a_send(channel, mover):
    transfer = mover.send(1, 5, range(3))
    complete_sends(channel)
    mover.close()
    assert transfer.done and transfer.reason == "peer lost" and not mover.busy


def test_a_later_receive_of_a_tag_waits_until_the_earlier_one_has_posted_all(channel, mover, arena):
    first, second = mover.receive(1, 5, range(WINDOW + 1)), mover.receive(1, 5, [15])
    other = mover.receive(1, 6, [14])
    channel.waiting[1, 5].append(header(WINDOW + 1))
    deliver(channel, 1, 6, 1, first=40)
    progress_until_done(mover, other)
    assert [r.tag for r in channel.pending("receive")] == [5] * WINDOW
    deliver(channel, 1, 5, WINDOW + 1)
    channel.waiting[1, 5].popleft()  # the header has been received
    deliver(channel, 1, 5, 1, first=WINDOW + 1)
    progress_until_done(mover, first, second)
    expected = [*range(1, WINDOW + 2), WINDOW + 2]
    assert arena.blocks[[*range(WINDOW + 1), 15], 0].tolist() == expected
    assert arena.blocks[14, 0] == 41


def test_a_drain_waits_for_earlier_receives_and_leaves_later_transfers_alone(channel, mover, arena):
    first, drain = mover.receive(1, 5, range(WINDOW + 1)), mover.drain(1, 5, 2)
    last = mover.receive(1, 5, [15])
    for first_block, num_blocks in ((0, WINDOW + 1), (WINDOW + 1, 2), (WINDOW + 3, 1)):
        deliver(channel, 1, 5, num_blocks, first_block)
    while not (first.done and drain.done and last.done):
        mover.progress()
    assert drain.num_bytes == 2 * BLOCK_BYTES and arena.blocks[15, 0] == WINDOW + 4


def test_a_lost_peer_ends_its_transfers_and_no_others(channel, mover):
    failing = [mover.send(1, 5, [0]), mover.receive(1, 5, range(1, 16)), mover.drain(1, 6, 3)]
    healthy = mover.receive(2, 5, [0])
    mover.progress()
    channel.lost.add(1)
    mover.drop_peer(1)
    assert all(t.done and t.failed for t in failing) and not healthy.done
    deliver(channel, 2, 5, 1)
    mover.progress()
    assert healthy.done and not healthy.failed


def test_a_transfer_begun_with_a_lost_peer_fails(channel, mover):
    channel.lost.add(1)
    transfers = [mover.send(1, 5, [0]), mover.receive(1, 5, [1])]
    mover.progress()
    assert all(t.done and t.failed for t in transfers)


@pytest.mark.parametrize("num_bytes", [0, 5, BLOCK_BYTES + 1])
def test_blocks_of_another_size_are_received_but_never_reach_the_arena(
    channel, mover, arena, num_bytes
):
    transfer = mover.receive(1, 5, range(3))
    channel.waiting[1, 5] += [header(3, num_bytes), *[bytes([9]) * num_bytes] * 3]
    progress_until_done(mover, transfer)
    assert transfer.reason == "size" and not channel.waiting[1, 5]
    assert transfer.num_bytes == 3 * num_bytes and not arena.blocks.any()


@pytest.mark.parametrize("num_bytes", [0, 5, BLOCK_BYTES - 1])
def test_a_block_shorter_than_its_header_says_fails_the_transfer(channel, mover, num_bytes):
    transfer = mover.receive(1, 5, range(3))
    blocks = [bytes(BLOCK_BYTES), bytes(num_bytes), bytes(BLOCK_BYTES)]
    channel.waiting[1, 5] += [header(3), *blocks]
    progress_until_done(mover, transfer)
    assert transfer.reason == "size" and not channel.waiting[1, 5]


@pytest.mark.parametrize("data", [b"", bytes(BLOCK_BYTES), header(3)[:-1], b"x" + header(3)[1:]])
def test_blocks_without_a_header_raise_an_assertion_error(channel, data):
    mover = BlockMover(channel)
    mover.drain(1, 5, 3)
    channel.waiting[1, 5].append(data)
    with pytest.raises(AssertionError, match="without a header"):
        mover.progress()


def test_the_arena_cannot_be_detached_during_a_transfer(channel, mover):
    mover.drain(1, 6, 1)
    mover.attach(None)  # a drain does not need it
    mover.attach(InPlace(HostArena(1)))
    mover.receive(1, 5, [0])
    with pytest.raises(AssertionError, match="in progress"):
        mover.attach(None)
    channel.waiting[1, 6] += [header(1, 3), b"xyz"]
    mover.progress()


def test_an_empty_transfer_is_done_at_once(mover):
    assert mover.send(1, 5, []).done and mover.receive(1, 5, []).done and mover.drain(1, 5, 0).done


def test_close_ends_every_receive(channel, mover):
    transfer = mover.receive(1, 5, range(16))
    mover.progress()
    mover.close()
    assert transfer.done and transfer.failed and not mover.busy


def test_close_cancels_receives_without_a_message(channel, mover):
    transfer = mover.receive(1, 5, range(3))
    channel.waiting[1, 5].append(header(3))
    mover.progress()
    assert len(channel.pending("receive")) == 3
    mover.close()
    assert transfer.done and transfer.failed and not mover.busy
