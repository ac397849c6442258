import ctypes

import numpy as np
import pytest

from mellmpi.transport.blocks import BlockMover, Staged, checksum
from mellmpi.transport.blocks.framing import TransferHeader, pack_numbers, unpack_opening
from mellmpi.transport.blocks.staging import WINDOW_BYTES, InPlace
from tests.transport.conformance import HostArena
from tests.transport.fakes import FakeChannel

BLOCK_BYTES = 2 << 20
WINDOW = WINDOW_BYTES // BLOCK_BYTES


class Standing:
    """Copies for an arena that MPI must not touch: a device's stand-in, in host memory."""

    def __init__(self, arena):
        self.arena, self.slots = arena, []
        self.slow, self.copying = False, []  # addresses, in order

    def done(self, address):
        return address not in self.copying

    def host_slot(self):
        self.slots.append(np.zeros(self.arena.block_bytes, np.uint8))
        return self.slots[-1].ctypes.data

    def _slot(self, address):
        return next(slot for slot in self.slots if slot.ctypes.data == address)

    def out(self, block_id, address):
        assert self.done(address)
        self._slot(address)[:] = self.arena.blocks[block_id]
        self.copying += [address] * self.slow

    def into(self, block_id, address):
        assert self.done(address)
        self.arena.blocks[block_id] = self._slot(address)
        self.copying += [address] * self.slow


@pytest.fixture
def channel():
    return FakeChannel(eager=1)  # answers leave at once


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
    assert all(request.done for request in channel.pending("receive"))  # given up


def carry(mover, *transfers):
    """Progress until they have ended; a call may end early, by its time."""
    for _ in range(1000):
        if all(transfer.done for transfer in transfers):
            return
        mover.progress()
    raise AssertionError("a transfer does not end")


HALF = FakeChannel.num_tags // 2  # answers have the upper half of the tags


def leave(channel):
    """All that was sent has left."""
    for request in channel.pending("send"):
        request.done = True


def answer(channel, peer, tag):
    channel.waiting[peer, tag + HALF].append(b"x")


def opening(num_blocks, block_bytes=BLOCK_BYTES, checked=False):
    return bytes(TransferHeader(num_blocks, block_bytes, checked).pack())


def arrive(channel, src, tag, num_blocks, first=0, sums=None):
    """A whole transfer, with these checksums if any."""
    channel.waiting[src, tag].append(opening(num_blocks, checked=sums is not None))
    for i in range(first, first + num_blocks):
        channel.waiting[src, tag].append(bytes([i + 1]) * BLOCK_BYTES)
    if sums is not None:
        channel.waiting[src, tag].append(bytes(pack_numbers(sums)))


def test_a_transfer_that_is_awaited_begins_when_it_comes(channel, mover):
    transfer = mover.receive(1, 5, range(2))
    mover.progress()
    awaited_s = transfer.started_s
    arrive(channel, 1, 5, 2)
    carry(mover, transfer)
    assert transfer.started_s > awaited_s and transfer.elapsed_s > 0


def test_receives_are_begun_a_window_at_a_time(channel, mover, arena):
    arrive(channel, 1, 5, 16)
    transfer = mover.receive(1, 5, range(16))
    assert not channel.requests  # to begin one may copy: only progress does it
    blocks = [channel.waiting[1, 5].pop() for _ in range(16)]
    assert mover.progress() == [1] and len(channel.pending("receive")) == WINDOW
    channel.waiting[1, 5].append(blocks.pop())
    assert mover.progress() == [1] and len(channel.pending("receive")) == WINDOW
    channel.waiting[1, 5].extend(reversed(blocks))
    while not transfer.done:
        assert mover.progress() == [1]
    assert (arena.blocks[:, 0] == np.arange(1, 17)).all() and not transfer.failed


def test_no_receive_is_posted_before_the_opening_has_said_what_comes(channel, mover):
    mover.receive(1, 5, range(16))
    mover.drain(1, 6, 16)
    mover.progress()
    assert not channel.requests


def test_sends_from_the_arena_are_posted_at_once(channel, mover):
    transfer = mover.send(1, 5, range(16))
    assert len(channel.pending("send")) == 16 + 1 and not transfer.done


def test_a_send_ends_when_the_receiver_says_that_all_has_come(channel, mover):
    transfer = mover.send(1, 5, range(16))
    leave(channel)
    mover.progress()
    assert transfer.num_bytes == 16 * BLOCK_BYTES and not transfer.done
    answer(channel, 1, 5)
    mover.progress()
    assert transfer.done and not transfer.failed


def test_a_receiver_answers_once_all_has_come_and_a_drain_too(channel, mover):
    channel.eager = 0
    mover.receive(1, 5, range(3))
    mover.drain(1, 6, 3)
    for tag in (5, 6):
        arrive(channel, 1, tag, 3)
    last = [channel.waiting[1, tag].pop() for tag in (5, 6)]
    for _ in range(9):
        mover.progress()
    assert not channel.pending("send")
    for tag, block in zip((5, 6), last, strict=True):
        channel.waiting[1, tag].append(block)
    for _ in range(9):
        mover.progress()
    assert [(r.tag, r.num_bytes) for r in channel.pending("send")] == [(5 + HALF, 1), (6 + HALF, 1)]
    leave(channel)
    mover.progress()


def test_closing_waits_for_no_answer_to_what_was_sent(channel, mover):
    transfer = mover.send(1, 5, range(3))
    leave(channel)
    mover.close()
    assert transfer.done and transfer.reason == "peer lost" and not mover.busy


def test_a_later_receive_of_a_tag_waits_until_the_earlier_one_has_begun_all(channel, mover, arena):
    first, second = mover.receive(1, 5, range(WINDOW + 1)), mover.receive(1, 5, [15])
    other = mover.receive(1, 6, [14])
    channel.waiting[1, 5].append(opening(WINDOW + 1))
    arrive(channel, 1, 6, 1, first=40)
    carry(mover, other)
    assert [r.tag for r in channel.pending("receive")] == [5] * WINDOW
    arrive(channel, 1, 5, WINDOW + 1)
    channel.waiting[1, 5].popleft()  # the opening has been taken in
    arrive(channel, 1, 5, 1, first=WINDOW + 1)
    carry(mover, first, second)
    expected = [*range(1, WINDOW + 2), WINDOW + 2]
    assert arena.blocks[[*range(WINDOW + 1), 15], 0].tolist() == expected
    assert arena.blocks[14, 0] == 41


def test_a_drain_waits_its_turn_and_takes_no_more_than_its_own(channel, mover, arena):
    first, drain = mover.receive(1, 5, range(WINDOW + 1)), mover.drain(1, 5, 2)
    last = mover.receive(1, 5, [15])
    for first_block, num_blocks in ((0, WINDOW + 1), (WINDOW + 1, 2), (WINDOW + 3, 1)):
        arrive(channel, 1, 5, num_blocks, first_block)
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


@pytest.mark.parametrize("num_bytes", [0, 5, BLOCK_BYTES + 1])
def test_blocks_of_another_size_never_reach_the_arena_but_all_are_taken_in(
    channel, mover, arena, num_bytes
):
    transfer = mover.receive(1, 5, range(3))
    channel.waiting[1, 5] += [opening(3, num_bytes), *[bytes([9]) * num_bytes] * 3]
    carry(mover, transfer)
    assert transfer.reason == "size" and not channel.waiting[1, 5]
    assert transfer.num_bytes == 3 * num_bytes and not arena.blocks.any()


@pytest.mark.parametrize("num_bytes", [0, 5, BLOCK_BYTES - 1])
def test_a_block_shorter_than_its_opening_says_fails_the_transfer(channel, mover, num_bytes):
    transfer = mover.receive(1, 5, range(3))
    blocks = [bytes(BLOCK_BYTES), bytes(num_bytes), bytes(BLOCK_BYTES)]
    channel.waiting[1, 5] += [opening(3), *blocks]
    carry(mover, transfer)
    assert transfer.reason == "size" and not channel.waiting[1, 5]


@pytest.mark.parametrize("data", [b"", bytes(BLOCK_BYTES), opening(3)[:-1], b"x" + opening(3)[1:]])
def test_blocks_without_an_opening_are_our_bug(channel, data):
    mover = BlockMover(channel)
    mover.drain(1, 5, 3)
    channel.waiting[1, 5].append(data)
    with pytest.raises(AssertionError, match="without an opening"):
        mover.progress()


def test_the_arena_stays_while_blocks_are_under_way(channel, mover):
    mover.drain(1, 6, 1)
    mover.attach(None)  # a drain does not need it
    mover.attach(InPlace(HostArena(1)))
    mover.receive(1, 5, [0])
    with pytest.raises(AssertionError, match="under way"):
        mover.attach(None)
    channel.waiting[1, 6] += [opening(1, 3), b"xyz"]
    mover.progress()


def test_an_empty_transfer_is_done_at_once(mover):
    assert mover.send(1, 5, []).done and mover.receive(1, 5, []).done and mover.drain(1, 5, 0).done


def test_closing_gives_up_every_receive(channel, mover):
    transfer = mover.receive(1, 5, range(16))
    mover.progress()
    mover.close()
    assert transfer.done and transfer.failed and not mover.busy


def test_closing_gives_up_receives_for_which_nothing_has_come(channel, mover):
    transfer = mover.receive(1, 5, range(3))
    channel.waiting[1, 5].append(opening(3))
    mover.progress()
    assert len(channel.pending("receive")) == 3
    mover.close()
    assert transfer.done and transfer.failed and not mover.busy


# --- checksums and openings ----------------------------------------------------------------------


@pytest.fixture
def checking(channel, arena):
    mover = BlockMover(channel, checked=lambda peer: peer == 1)
    mover.attach(InPlace(arena))
    return mover


def test_the_last_message_tells_the_checksum_of_every_block_as_it_was_when_it_was_sent(
    channel, checking, arena
):
    arena.fill(3)
    expected = tuple(checksum(memoryview(arena.blocks[i])) for i in (5, 2, 9))
    transfer = checking.send(1, 5, [5, 2, 9])
    arena.blocks[:] = 0
    first, *_, last = [ctypes.string_at(r.address, r.num_bytes) for r in channel.pending("send")]
    assert unpack_opening(first) == TransferHeader(3, BLOCK_BYTES, True)
    assert last == pack_numbers(expected)
    leave(channel)
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
    arrive(channel, 1, 5, 3, sums=sums)
    carry(checking, transfer)
    assert transfer.reason == "checksum"


def test_who_does_not_check_takes_checksums_all_the_same(channel, mover):
    transfer = mover.receive(1, 5, range(3))
    arrive(channel, 1, 5, 3, sums=[0, 0, 0])
    carry(mover, transfer)
    assert not transfer.failed and not channel.waiting[1, 5]


@pytest.mark.parametrize("num_blocks", [1, 2, WINDOW + 2])
def test_a_stream_that_ends_early_is_truncated_and_nothing_stays_posted(channel, mover, num_blocks):
    transfer = mover.receive(1, 5, range(WINDOW + 3))
    arrive(channel, 1, 5, num_blocks)
    carry(mover, transfer)
    assert transfer.reason == "truncated" and not channel.pending("receive")


def test_a_stream_that_goes_on_is_taken_in_to_its_end(channel, mover, arena):
    transfer, later = mover.receive(1, 5, range(3)), mover.receive(1, 5, [9])
    arrive(channel, 1, 5, 7)
    carry(mover, transfer)
    assert transfer.reason == "size" and not later.done
    arrive(channel, 1, 5, 1, first=20)
    carry(mover, later)
    assert later.done and not later.failed and arena.blocks[9, 0] == 21


def test_a_peer_lost_while_a_stream_goes_on_ends_it(channel, mover):
    transfer = mover.receive(1, 5, range(3))
    arrive(channel, 1, 5, 7)
    channel.waiting[1, 5].pop()
    for _ in range(20):
        mover.progress()
    assert not transfer.done
    channel.lost.add(1)
    mover.forget(1)
    assert transfer.done and transfer.failed


def test_tags_that_the_channel_cannot_tell_apart_keep_their_order(channel, mover, arena):
    far = 5 + channel.num_tags
    first, second = mover.receive(1, 5, range(WINDOW + 1)), mover.receive(1, far, [15])
    arrive(channel, 1, 5, WINDOW + 1)
    arrive(channel, 1, 5, 1, first=30)
    while not (first.done and second.done):
        mover.progress()
    assert arena.blocks[15, 0] == 31 and not first.failed and not second.failed


def test_an_opening_comes_back_as_it_was_packed():
    for opening in (TransferHeader(3, 10, False), TransferHeader(2, 10, True, 7, (2**64 - 1, 5))):
        assert unpack_opening(opening.pack()) == opening


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
    answer(channel, 1, 5)
    while not transfer.done:
        assert 0 < len(channel.pending("send")) <= WINDOW + 1  # the opening needs no slot
        for request in channel.pending("send"):
            sent.append(ctypes.string_at(request.address, request.num_bytes))
            request.done = True
        staged.progress()
    assert unpack_opening(sent[0]) == TransferHeader(16, BLOCK_BYTES, False)
    assert sent[1:] == [arena.blocks[i].tobytes() for i in range(15, -1, -1)]
    assert len(copies.slots) <= 2 * WINDOW


def test_two_staged_transfers_never_wait_for_each_others_slots(channel, staged):
    stuck = [staged.send(1, 5, range(16)), staged.receive(2, 5, range(16))]
    staged.progress()
    other = staged.receive(3, 5, [0])
    arrive(channel, 3, 5, 1)
    carry(staged, other)
    assert not any(t.done for t in stuck)


def test_a_block_is_sent_once_its_copy_is_done_and_others_are_copied_meanwhile(
    channel, staged, copies
):
    copies.slow = True
    transfer = staged.send(1, 5, range(16))
    assert len(copies.copying) == WINDOW and len(channel.pending("send")) == 1  # the opening
    channel.pending("send")[0].done = True
    first = copies.copying.pop(0)
    staged.progress()
    assert [request.address for request in channel.pending("send")] == [first]
    copies.slow = False
    copies.copying.clear()
    answer(channel, 1, 5)
    while not transfer.done:
        staged.progress()
        leave(channel)
    assert len(copies.slots) == WINDOW and not transfer.failed


def test_a_transfer_ends_when_its_last_block_is_in_its_place(channel, staged, arena, copies):
    copies.slow = True
    arrive(channel, 1, 5, 16)
    transfer = staged.receive(1, 5, range(16))
    for landed in range(16):
        for _ in range(3):
            staged.progress()
        assert not transfer.done and len(copies.copying) == min(WINDOW, 16 - landed)
        copies.copying.pop(0)
    staged.progress()
    assert transfer.done and not transfer.failed and len(copies.slots) == WINDOW
    assert (arena.blocks[:, 0] == np.arange(1, 17)).all()


def test_copies_under_way_outlast_a_lost_peer_and_their_slots_are_used_again(
    channel, staged, copies
):
    copies.slow = True
    transfer = staged.send(1, 5, range(16))
    channel.lost.add(1)
    staged.forget(1)
    assert not transfer.done
    copies.slow = False
    copies.copying.clear()
    staged.progress()
    assert transfer.done and transfer.reason == "peer lost"
    staged.send(2, 5, range(16))
    assert len(copies.slots) == WINDOW
