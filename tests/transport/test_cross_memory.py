import ctypes
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from mellmpi.transport.blocks import BlockMover, Proof, Staged, checksum
from mellmpi.transport.blocks.cross_memory import (
    CrossMemoryRead,
    CrossMemoryReads,
    areas,
    copy_from,
)
from mellmpi.transport.blocks.framing import TransferHeader, pack_numbers, unpack_opening
from mellmpi.transport.blocks.staging import InPlace
from mellmpi.transport.channel import LinkError
from tests.transport.conformance import HostArena
from tests.transport.fakes import FakeChannel
from tests.transport.test_block_mover import Standing, carry

BLOCK_BYTES = 10_000
HALF = FakeChannel.num_tags // 2  # answers have the upper half of the tags
OURS = os.getpid()  # a process may read its own memory in this way, too
ANSWER = b"x"


@pytest.fixture
def nobody():
    """The number of a process that is gone."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.fixture
def channel():
    return FakeChannel()


@pytest.fixture
def there():
    """The arena of the other worker."""
    arena = HostArena(16, BLOCK_BYTES)
    arena.fill(3)
    return arena


@pytest.fixture
def here():
    return HostArena(16, BLOCK_BYTES)


@pytest.fixture
def mover(channel, here):
    """Peer 1 is checked, and reads."""
    mover = BlockMover(channel, checked=lambda peer: peer == 1, read_by=lambda peer: peer < 3)
    mover.attach(InPlace(here))
    yield mover
    mover.close()
    assert not channel.pending("receive")


def addresses(arena, ids):
    return tuple(arena.address + i * arena.block_bytes for i in ids)


def offer(channel, src, arena, ids, checked=False, pid=OURS, sums=None):
    opening = TransferHeader(len(ids), arena.block_bytes, checked, pid, addresses(arena, ids))
    channel.waiting[src, 5].append(bytes(opening.pack()))
    if checked:
        sums = sums or [checksum(memoryview(arena.blocks[i])) for i in ids]
        channel.waiting[src, 5].append(bytes(pack_numbers(sums)))


def sent(channel):
    return [(r.tag, ctypes.string_at(r.address, r.num_bytes)) for r in channel.pending("send")]


def leave(channel):
    for request in channel.pending("send"):
        request.done = True


# --- reading -------------------------------------------------------------------------------------


def test_what_a_process_may_read_is_found_by_reading_it(nobody):
    proof = Proof()
    assert Proof.holds(proof.packed)
    gone = Proof._FORM.pack(nobody, *Proof._FORM.unpack(proof.packed)[1:])
    changed = proof.packed[:-1] + bytes([proof.packed[-1] ^ 1])
    unmapped = Proof._FORM.pack(OURS, 8, proof.packed[-16:])
    assert not any(Proof.holds(packed) for packed in (gone, changed, unmapped))


def test_a_copy_that_ends_early_is_an_error(here, there):
    sources = areas([*addresses(there, [0]), 8], BLOCK_BYTES)  # nothing is mapped at 8
    with pytest.raises(LinkError, match=f"only {BLOCK_BYTES} bytes"):
        copy_from(OURS, sources, areas(addresses(here, [0, 1]), BLOCK_BYTES))


def test_a_read_is_claimed_in_pieces_of_one_block_at_least(here, there):
    read = CrossMemoryRead(
        OURS, addresses(there, range(7)), addresses(here, range(7)), BLOCK_BYTES, False
    )
    claimed = [read.claim(n * BLOCK_BYTES) for n in (2, 0, 9)]
    assert claimed == [range(2), range(2, 3), range(3, 7)] and not read.num_left


def test_a_read_is_finished_when_its_last_piece_is_whoever_copies_it(here, there):
    read = CrossMemoryRead(
        OURS, addresses(there, range(4)), addresses(here, range(4)), BLOCK_BYTES, True
    )
    first, last = read.claim(BLOCK_BYTES), read.claim(3 * BLOCK_BYTES)
    for blocks in (last, first):
        assert read.finished() is None
        read.settle(len(blocks), read.copy(blocks))
    assert read.finished() == 4 * BLOCK_BYTES
    assert read.checksums == [checksum(memoryview(there.blocks[i])) for i in range(4)]


def test_few_blocks_overtake_many(here, there):
    reads = CrossMemoryReads()
    many, few = (
        CrossMemoryRead(
            OURS, addresses(there, range(n)), addresses(here, range(n)), BLOCK_BYTES, False
        )
        for n in (16, 2)
    )
    reads.begin(many)
    reads.carry_out(BLOCK_BYTES)
    reads.begin(few)
    reads.carry_out(2 * BLOCK_BYTES)
    assert few.finished() and many.num_left == 15


def test_a_read_is_under_way_until_its_last_piece_is_here(here, there, monkeypatch):
    reads, seen = CrossMemoryReads(), []
    read = CrossMemoryRead(
        OURS, addresses(there, range(2)), addresses(here, range(2)), BLOCK_BYTES, False
    )
    copy = read.copy
    monkeypatch.setattr(
        read, "copy", lambda blocks: seen.append((bool(reads), reads.under_way)) or copy(blocks)
    )
    reads.begin(read)
    while reads.under_way:
        reads.carry_out(BLOCK_BYTES)
    assert seen == [(True, True), (False, True)] and read.finished()


def test_a_read_that_is_dropped_ends_with_the_pieces_that_are_being_copied(here, there):
    reads = CrossMemoryReads()
    read = CrossMemoryRead(
        OURS, addresses(there, range(4)), addresses(here, range(4)), BLOCK_BYTES, False
    )
    reads.begin(read)
    blocks = read.claim(BLOCK_BYTES)
    reads.drop(read)
    assert read.finished() is None and not reads.carry_out(BLOCK_BYTES)
    read.settle(len(blocks), None)
    with pytest.raises(LinkError, match="given up"):
        read.finished()


# --- transfers that are read ---------------------------------------------------------------------


@pytest.mark.parametrize("src", [1, 2])  # with checksums, and without
def test_blocks_are_read_to_where_they_belong_and_the_sender_is_told(
    channel, mover, here, there, src
):
    transfer = mover.receive(src, 5, [9, 2, 7])
    offer(channel, src, there, [0, 4, 15], checked=src == 1)
    for _ in range(20):
        mover.progress()
    assert [tag for tag, _ in sent(channel)] == [5 + HALF] and not transfer.done
    leave(channel)
    carry(mover, transfer)
    assert not transfer.failed and transfer.num_bytes == 3 * BLOCK_BYTES
    assert np.array_equal(here.blocks[[9, 2, 7]], there.blocks[[0, 4, 15]])


def test_blocks_that_were_changed_on_the_way_fail_the_transfer(channel, mover, there):
    transfer = mover.receive(1, 5, range(3))
    offer(channel, 1, there, range(3), checked=True, sums=[1, 2, 3])
    mover.progress()
    leave(channel)
    carry(mover, transfer)
    assert transfer.reason == "checksum"


@pytest.mark.parametrize(
    ("num_blocks", "block_bytes", "reason"),
    [(2, BLOCK_BYTES, "truncated"), (4, BLOCK_BYTES, "size"), (3, BLOCK_BYTES + 8, "size")],
)
def test_what_is_not_as_announced_is_not_read_but_answered(
    channel, mover, here, num_blocks, block_bytes, reason
):
    other = HostArena(4, block_bytes)
    other.fill(1)
    transfer = mover.receive(2, 5, range(3))
    offer(channel, 2, other, range(num_blocks))
    mover.progress()
    assert len(sent(channel)) == 1
    leave(channel)
    carry(mover, transfer)
    assert transfer.reason == reason and not here.blocks.any()


def test_a_drain_answers_and_reads_nothing(channel, mover, here, there):
    transfer = mover.drain(1, 5, 3)
    offer(channel, 1, there, range(3), checked=True)
    mover.progress()
    leave(channel)
    carry(mover, transfer)
    assert not transfer.failed and not channel.waiting[1, 5] and not here.blocks.any()


def test_memory_that_is_gone_is_a_lost_peer(channel, mover, there, nobody):
    transfer = mover.receive(2, 5, range(3))
    offer(channel, 2, there, range(3), pid=nobody)
    mover.progress()
    leave(channel)
    carry(mover, transfer)
    assert transfer.reason == "peer lost"


def test_a_peer_lost_while_it_is_read_ends_the_transfer(channel, mover, there):
    transfer = mover.receive(2, 5, range(3))
    offer(channel, 2, there, range(3))
    mover._round(mover._moves)  # begun, and no piece copied
    assert mover._reads and not transfer.done
    channel.lost.add(2)
    mover.forget(2)
    assert transfer.done and transfer.reason == "peer lost" and not mover._reads


def test_a_burst_of_messages_ends_where_there_is_something_to_read(
    channel, mover, there, monkeypatch
):
    mover.receive(2, 5, range(3))
    offer(channel, 2, there, range(3))
    rounds, drive = [], mover._round
    monkeypatch.setattr(mover, "_round", lambda moves: rounds.append(0) or drive(moves))
    assert mover._burst(math.inf) == {2} and len(rounds) == 1
    assert mover._burst(math.inf) == set()


def test_transfers_of_one_tag_are_answered_in_their_order(channel, mover, there):
    """Or the sender would take the answer to the second for that to the first."""
    first, second = mover.receive(2, 5, range(3)), mover.receive(2, 5, range(3, 6))
    offer(channel, 2, there, range(3))
    offer(channel, 2, there, range(3))
    mover._round(mover._moves)
    assert not sent(channel) and len(channel.waiting[2, 5]) == 1
    for _ in range(5):
        mover.progress()
        leave(channel)
    assert first.done and second.done and not second.failed


def test_a_device_is_read_into_through_few_slots(channel, here, there, monkeypatch):
    monkeypatch.setattr("mellmpi.transport.blocks.receiving.window", lambda _: 3)
    copies = Standing(here)
    mover = BlockMover(channel)
    mover.attach(Staged(BLOCK_BYTES, copies))
    transfer = mover.receive(2, 5, range(16))
    offer(channel, 2, there, range(16))
    for _ in range(50):
        mover.progress()
        leave(channel)
    assert transfer.done and not transfer.failed and len(copies.slots) == 3
    assert np.array_equal(here.blocks, there.blocks)


# --- transfers that others read ------------------------------------------------------------------


def test_an_opening_says_where_the_blocks_are_and_the_answer_ends_the_transfer(
    channel, mover, here
):
    transfer = mover.send(2, 5, [4, 1])
    ((tag, data),) = sent(channel)
    assert (tag, unpack_opening(data)) == (
        5,
        TransferHeader(2, BLOCK_BYTES, False, OURS, addresses(here, [4, 1])),
    )
    leave(channel)
    mover.progress()
    assert not transfer.done
    channel.waiting[2, 5 + HALF].append(ANSWER)
    mover.progress()
    assert transfer.done and transfer.num_bytes == 2 * BLOCK_BYTES


def test_checksums_of_what_is_offered_follow_a_window_at_a_time(channel, mover, here, monkeypatch):
    monkeypatch.setattr("mellmpi.transport.blocks.sending.window", lambda _: 2)
    here.fill(5)
    expected = [checksum(memoryview(here.blocks[i])) for i in range(5)]
    transfer = mover.send(1, 5, range(5))
    assert len(sent(channel)) == 1
    channel.waiting[1, 5 + HALF].append(ANSWER)
    for _ in range(3):
        mover.progress()
    assert sent(channel)[-1] == (5, bytes(pack_numbers(expected)))
    leave(channel)
    carry(mover, transfer)


def test_an_answer_never_ends_a_transfer_of_the_same_tag_that_comes(channel, mover, there):
    going, coming = mover.send(2, 5, range(3)), mover.receive(2, 5, range(4, 7))
    channel.waiting[2, 5 + HALF].append(ANSWER)
    leave(channel)
    carry(mover, going)
    assert not coming.done
    offer(channel, 2, there, range(3))
    for _ in range(5):
        mover.progress()
        leave(channel)
    assert coming.done and not coming.failed


def test_who_reads_and_is_lost_leaves_the_transfer_failed(channel, mover):
    transfer = mover.send(2, 5, range(3))
    leave(channel)
    channel.lost.add(2)
    mover.forget(2)
    assert transfer.done and transfer.reason == "peer lost" and not transfer.num_bytes


def test_closing_waits_for_no_answer(channel, mover):
    transfer = mover.send(2, 5, range(3))
    leave(channel)
    mover.close()
    assert transfer.done and transfer.failed and not mover.busy


def test_slots_of_a_device_are_sent_and_not_offered(channel, here):
    mover = BlockMover(channel, read_by=lambda _: True)
    mover.attach(Staged(BLOCK_BYTES, Standing(here)))
    mover.send(2, 5, range(3))
    assert unpack_opening(sent(channel)[0][1]).pid is None and len(sent(channel)) == 4
