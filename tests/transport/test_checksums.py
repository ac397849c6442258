"""Checksums, and transfers whose length is not as expected."""

import ctypes

import pytest

from mellmpi.transport.blocks import BlockMover, checksum
from mellmpi.transport.blocks.framing import TransferHeader, pack_numbers
from mellmpi.transport.blocks.staging import InPlace
from tests.transport.block_messages import (
    BLOCK_BYTES,
    WINDOW,
    answer,
    complete_sends,
    deliver,
    progress_until_done,
)


@pytest.fixture
def checking(channel, arena):
    mover = BlockMover(channel, checked=lambda peer: peer == 1)
    mover.attach(InPlace(arena))
    return mover


def test_the_last_message_has_the_checksum_of_every_block_at_the_time_of_the_send(
    channel, checking, arena
):
    arena.fill(3)
    expected = tuple(checksum(memoryview(arena.blocks[i])) for i in (5, 2, 9))
    transfer = checking.send(1, 5, [5, 2, 9])
    arena.blocks[:] = 0
    first, *_, last = [ctypes.string_at(r.address, r.num_bytes) for r in channel.pending("send")]
    assert TransferHeader.unpack(first) == TransferHeader(3, BLOCK_BYTES, True)
    assert last == pack_numbers(expected)
    complete_sends(channel)
    answer(channel, 1, 5)
    checking.progress()
    assert transfer.done and transfer.num_bytes == 3 * BLOCK_BYTES


def test_checked_sends_are_posted_a_window_at_a_time(channel, checking):
    checking.send(1, 5, range(16))
    checking.send(2, 5, range(16))
    posted = [request.peer for request in channel.pending("send")]
    assert posted.count(1) == 1 + WINDOW and posted.count(2) == 1 + 16


@pytest.mark.parametrize("wrong", [0, 1, 2, "none"])
def test_a_wrong_or_missing_checksum_fails_the_transfer(channel, checking, wrong):
    sums = [checksum(memoryview(bytes([i + 1]) * BLOCK_BYTES)) for i in range(3)]
    if wrong == "none":
        sums = None
    else:
        sums[wrong] ^= 1
    transfer = checking.receive(1, 5, range(3))
    deliver(channel, 1, 5, 3, sums=sums)
    progress_until_done(checking, transfer)
    assert transfer.reason == "checksum"


def test_a_receiver_without_checksums_accepts_and_ignores_them(channel, mover):
    transfer = mover.receive(1, 5, range(3))
    deliver(channel, 1, 5, 3, sums=[0, 0, 0])
    progress_until_done(mover, transfer)
    assert not transfer.failed and not channel.waiting[1, 5]


@pytest.mark.parametrize("num_blocks", [1, 2, WINDOW + 2])
def test_a_transfer_that_ends_early_is_truncated_and_nothing_stays_posted(
    channel, mover, num_blocks
):
    transfer = mover.receive(1, 5, range(WINDOW + 3))
    deliver(channel, 1, 5, num_blocks)
    progress_until_done(mover, transfer)
    assert transfer.reason == "truncated" and not channel.pending("receive")


def test_a_transfer_longer_than_expected_is_received_to_its_end(channel, mover, arena):
    transfer, later = mover.receive(1, 5, range(3)), mover.receive(1, 5, [9])
    deliver(channel, 1, 5, 7)
    progress_until_done(mover, transfer)
    assert transfer.reason == "size" and not later.done
    deliver(channel, 1, 5, 1, first=20)
    progress_until_done(mover, later)
    assert later.done and not later.failed and arena.blocks[9, 0] == 21


def test_the_loss_of_the_peer_ends_a_transfer_longer_than_expected(channel, mover):
    transfer = mover.receive(1, 5, range(3))
    deliver(channel, 1, 5, 7)
    channel.waiting[1, 5].pop()
    for _ in range(20):
        mover.progress()
    assert not transfer.done
    channel.lost.add(1)
    mover.drop_peer(1)
    assert transfer.done and transfer.failed


def test_tags_that_the_channel_cannot_tell_apart_keep_their_order(channel, mover, arena):
    far = 5 + channel.num_tags
    first, second = mover.receive(1, 5, range(WINDOW + 1)), mover.receive(1, far, [15])
    deliver(channel, 1, 5, WINDOW + 1)
    deliver(channel, 1, 5, 1, first=30)
    while not (first.done and second.done):
        mover.progress()
    assert arena.blocks[15, 0] == 31 and not first.failed and not second.failed


def test_a_header_is_unpacked_as_it_was_packed():
    for header in (TransferHeader(3, 10, False), TransferHeader(2, 10, True, 7, (2**64 - 1, 5))):
        assert TransferHeader.unpack(header.pack()) == header
