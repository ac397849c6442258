import ctypes

import numpy as np
import pytest

from mellmpi.transport.blocks import WINDOW_BYTES, BlockMover, InPlace
from mellmpi.transport.devices import Staged
from tests.transport.conformance import HostArena
from tests.transport.fakes import FakeChannel

BLOCK_BYTES = 2 << 20
WINDOW = WINDOW_BYTES // BLOCK_BYTES


class Standing:
    """Copies for an arena that MPI must not touch: a device's stand-in, in host memory."""

    def __init__(self, arena):
        self.arena, self.slots = arena, []

    def host_slot(self):
        self.slots.append(np.zeros(self.arena.block_bytes, np.uint8))
        return self.slots[-1].ctypes.data

    def _slot(self, address):
        return next(slot for slot in self.slots if slot.ctypes.data == address)

    def out(self, block_id, address):
        self._slot(address)[:] = self.arena.blocks[block_id]

    def into(self, block_id, address):
        self.arena.blocks[block_id] = self._slot(address)


@pytest.fixture
def channel():
    return FakeChannel()


@pytest.fixture
def arena():
    return HostArena(16, BLOCK_BYTES)


@pytest.fixture
def mover(channel, arena):
    mover = BlockMover(channel)
    mover.attach(InPlace(arena))
    yield mover
    mover.close()
    assert not mover.busy or channel.pending("send")
    assert not channel.pending("receive") and not channel.pending("discard")


def arrive(channel, src, tag, num_blocks, first=0):
    for i in range(first, first + num_blocks):
        channel.waiting[src, tag].append(bytes([i + 1]) * BLOCK_BYTES)


def test_receives_are_posted_a_window_at_a_time(channel, mover, arena):
    transfer = mover.receive(1, 5, range(16))
    assert not channel.requests  # posting may copy: only progress does it
    assert mover.progress() == [] and len(channel.pending("receive")) == WINDOW
    arrive(channel, 1, 5, 1)
    assert mover.progress() == [1] and len(channel.pending("receive")) == WINDOW
    arrive(channel, 1, 5, 15, first=1)
    while not transfer.done:
        assert mover.progress() == [1]
    assert (arena.blocks[:, 0] == np.arange(1, 17)).all() and not transfer.failed


def test_sends_from_the_arena_are_posted_at_once(channel, mover):
    transfer = mover.send(1, 5, range(16))
    assert len(channel.pending("send")) == 16 and not transfer.done
    for request in channel.pending("send"):
        request.done = True
    mover.progress()
    assert transfer.done and transfer.num_bytes == 16 * BLOCK_BYTES


def test_a_later_receive_of_a_tag_waits_until_the_earlier_one_is_posted(channel, mover, arena):
    first, second = mover.receive(1, 5, range(WINDOW + 1)), mover.receive(1, 5, [15])
    other = mover.receive(1, 6, [14])
    mover.progress()
    assert {r.tag for r in channel.pending("receive")} == {5, 6}
    assert len([r for r in channel.pending("receive") if r.tag == 5]) == WINDOW
    arrive(channel, 1, 5, WINDOW + 2)
    arrive(channel, 1, 6, 1, first=40)
    while not (first.done and second.done and other.done):
        mover.progress()
    expected = [*range(1, WINDOW + 2), WINDOW + 2]
    assert arena.blocks[[*range(WINDOW + 1), 15], 0].tolist() == expected
    assert arena.blocks[14, 0] == 41


def test_a_drain_waits_its_turn_and_takes_no_more_than_its_own(channel, mover, arena):
    first, drain = mover.receive(1, 5, range(WINDOW + 1)), mover.drain(1, 5, 2)
    last = mover.receive(1, 5, [15])
    arrive(channel, 1, 5, WINDOW + 4)
    while not (first.done and drain.done and last.done):
        mover.progress()
    assert drain.num_bytes == 2 * BLOCK_BYTES and arena.blocks[15, 0] == WINDOW + 4


def test_a_lost_peer_ends_its_transfers_and_no_others(channel, mover):
    doomed = [mover.send(1, 5, [0]), mover.receive(1, 5, range(1, 16)), mover.drain(1, 6, 3)]
    healthy = mover.receive(2, 5, [0])
    mover.progress()
    channel.lost.add(1)
    mover.forget(1)
    assert all(t.done and t.failed for t in doomed) and not healthy.done
    arrive(channel, 2, 5, 1)
    mover.progress()
    assert healthy.done and not healthy.failed


def test_a_transfer_begun_with_a_lost_peer_fails(channel, mover):
    channel.lost.add(1)
    transfers = [mover.send(1, 5, [0]), mover.receive(1, 5, [1])]
    mover.progress()
    assert all(t.done and t.failed for t in transfers)


def test_a_block_of_another_size_fails_the_transfer_but_all_are_taken_in(channel, mover):
    transfer = mover.receive(1, 5, range(3))
    mover.progress()
    for request, num_bytes in zip(channel.pending("receive"), (5, BLOCK_BYTES, 5), strict=True):
        request.done, request.num_bytes = True, num_bytes
    mover.progress()
    assert transfer.done and transfer.failed and transfer.num_bytes == BLOCK_BYTES + 10


def test_a_block_that_was_too_long_fails_the_transfer_and_no_more(channel, mover, arena):
    transfer = mover.receive(1, 5, range(3))
    mover.progress()
    channel.too_long = channel.pending("receive")[:1]
    arrive(channel, 1, 5, 3)
    mover.progress()
    assert transfer.done and transfer.failed and arena.blocks[1:3, 0].tolist() == [2, 3]


def test_the_arena_stays_while_blocks_are_under_way(channel, mover):
    mover.drain(1, 6, 1)
    mover.attach(None)  # a drain does not need it
    mover.attach(InPlace(HostArena(1)))
    mover.receive(1, 5, [0])
    with pytest.raises(AssertionError, match="under way"):
        mover.attach(None)
    channel.waiting[1, 6].append(b"xyz")
    mover.progress()


def test_an_empty_transfer_is_done_at_once(mover):
    assert mover.send(1, 5, []).done and mover.receive(1, 5, []).done and mover.drain(1, 5, 0).done


def test_closing_gives_up_every_receive(channel, mover):
    transfer = mover.receive(1, 5, range(16))
    mover.progress()
    mover.close()
    assert transfer.done and transfer.failed and not mover.busy


# --- staging -------------------------------------------------------------------------------------


@pytest.fixture
def copies(arena):
    return Standing(arena)


@pytest.fixture
def staged(channel, copies):
    mover = BlockMover(channel)
    mover.attach(Staged(BLOCK_BYTES, copies))
    return mover


def test_staged_blocks_arrive_in_the_right_place_through_few_slots(channel, staged, arena, copies):
    order = np.random.default_rng(1).permutation(16).tolist()
    transfer = staged.receive(1, 5, order)
    arrive(channel, 1, 5, 16)
    while not transfer.done:
        staged.progress()
    assert (arena.blocks[order, 0] == np.arange(1, 17)).all()
    assert len(copies.slots) == WINDOW


def test_staged_sends_keep_to_a_window_and_carry_the_right_bytes(channel, staged, arena, copies):
    arena.fill(7)
    sent, transfer = [], staged.send(1, 5, range(15, -1, -1))
    while not transfer.done:
        assert 0 < len(channel.pending("send")) <= WINDOW
        for request in channel.pending("send"):
            sent.append(ctypes.string_at(request.address, request.num_bytes))
            request.done = True
        staged.progress()
    assert sent == [arena.blocks[i].tobytes() for i in range(15, -1, -1)]
    assert len(copies.slots) <= 2 * WINDOW


def test_two_staged_transfers_never_wait_for_each_others_slots(channel, staged):
    stuck = [staged.send(1, 5, range(16)), staged.receive(2, 5, range(16))]
    staged.progress()
    other = staged.receive(3, 5, [0])
    arrive(channel, 3, 5, 1)
    staged.progress()
    assert other.done and not any(t.done for t in stuck)
