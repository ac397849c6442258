"""Transfers through slots in host memory."""

import ctypes

import numpy as np
import pytest

from mellmpi.transport.blocks import BlockMover, Staged
from mellmpi.transport.blocks.framing import TransferHeader
from tests.transport.block_messages import (
    BLOCK_BYTES,
    WINDOW,
    answer,
    complete_sends,
    deliver,
    progress_until_done,
)
from tests.transport.fakes import DelayedCopies


@pytest.fixture
def copies(arena):
    return DelayedCopies(arena)


@pytest.fixture
def staged(channel, copies):
    mover = BlockMover(channel)
    mover.attach(Staged(BLOCK_BYTES, copies))
    return mover


def test_staged_blocks_arrive_in_the_right_place_through_few_slots(channel, staged, arena, copies):
    order = np.random.default_rng(1).permutation(16).tolist()
    transfer = staged.receive(1, 5, order)
    deliver(channel, 1, 5, 16)
    while not transfer.done:
        staged.progress()
    assert (arena.blocks[order, 0] == np.arange(1, 17)).all()
    assert len(copies.slots) == WINDOW


def test_staged_sends_keep_to_a_window_and_carry_the_right_bytes(channel, staged, arena, copies):
    arena.fill(7)
    sent, transfer = [], staged.send(1, 5, range(15, -1, -1))
    answer(channel, 1, 5)
    while not transfer.done:
        assert 0 < len(channel.pending("send")) <= WINDOW + 1  # the header needs no slot
        for request in channel.pending("send"):
            sent.append(ctypes.string_at(request.address, request.num_bytes))
            request.done = True
        staged.progress()
    assert TransferHeader.unpack(sent[0]) == TransferHeader(16, BLOCK_BYTES, False)
    assert sent[1:] == [arena.blocks[i].tobytes() for i in range(15, -1, -1)]
    assert len(copies.slots) <= 2 * WINDOW


def test_a_staged_transfer_never_waits_for_the_slots_of_others(channel, staged):
    stuck = [staged.send(1, 5, range(16)), staged.receive(2, 5, range(16))]
    staged.progress()
    other = staged.receive(3, 5, [0])
    deliver(channel, 3, 5, 1)
    progress_until_done(staged, other)
    assert not any(t.done for t in stuck)


def test_a_block_is_sent_once_its_copy_is_done_and_others_are_copied_meanwhile(
    channel, staged, copies
):
    copies.slow = True
    transfer = staged.send(1, 5, range(16))
    assert len(copies.copying) == WINDOW and len(channel.pending("send")) == 1  # the header
    channel.pending("send")[0].done = True
    first = copies.copying.pop(0)
    staged.progress()
    assert [request.address for request in channel.pending("send")] == [first]
    copies.slow = False
    copies.copying.clear()
    answer(channel, 1, 5)
    while not transfer.done:
        staged.progress()
        complete_sends(channel)
    assert len(copies.slots) == WINDOW and not transfer.failed


def test_a_transfer_ends_when_its_last_block_is_in_the_arena(channel, staged, arena, copies):
    copies.slow = True
    deliver(channel, 1, 5, 16)
    transfer = staged.receive(1, 5, range(16))
    for num_copied in range(16):
        for _ in range(3):
            staged.progress()
        assert not transfer.done and len(copies.copying) == min(WINDOW, 16 - num_copied)
        copies.copying.pop(0)
    staged.progress()
    assert transfer.done and not transfer.failed and len(copies.slots) == WINDOW
    assert (arena.blocks[:, 0] == np.arange(1, 17)).all()


def test_copies_continue_after_the_loss_of_a_peer_and_their_slots_are_reused(
    channel, staged, copies
):
    copies.slow = True
    transfer = staged.send(1, 5, range(16))
    channel.lost.add(1)
    staged.drop_peer(1)
    assert not transfer.done
    copies.slow = False
    copies.copying.clear()
    staged.progress()
    assert transfer.done and transfer.reason == "peer lost"
    staged.send(2, 5, range(16))
    assert len(copies.slots) == WINDOW
