import pytest

from mellmpi.transport.blocks import CmaProbe, checksum
from mellmpi.transport.blocks.cross_memory import (
    CrossMemoryRead,
    CrossMemoryReads,
    copy_from,
    iovecs,
)
from mellmpi.transport.channel import LinkError
from tests.transport.memory_areas import PID, SMALL_BLOCK_BYTES, addresses


def test_a_probe_finds_out_whether_memory_is_readable(dead_pid):
    probe = CmaProbe()
    assert CmaProbe.readable(probe.packed)
    dead = CmaProbe._FORM.pack(dead_pid, *CmaProbe._FORM.unpack(probe.packed)[1:])
    changed = probe.packed[:-1] + bytes([probe.packed[-1] ^ 1])
    unmapped = CmaProbe._FORM.pack(PID, 8, probe.packed[-16:])
    assert not any(CmaProbe.readable(packed) for packed in (dead, changed, unmapped))


def test_a_copy_that_ends_early_is_an_error(target, source):
    sources = iovecs([*addresses(source, [0]), 8], SMALL_BLOCK_BYTES)  # address 8 is not mapped
    with pytest.raises(LinkError, match=f"only {SMALL_BLOCK_BYTES} bytes"):
        copy_from(PID, sources, iovecs(addresses(target, [0, 1]), SMALL_BLOCK_BYTES))


def test_a_read_is_claimed_in_pieces_of_one_block_at_least(target, source):
    read = CrossMemoryRead(
        PID, addresses(source, range(7)), addresses(target, range(7)), SMALL_BLOCK_BYTES, False
    )
    claimed = [read.claim(n * SMALL_BLOCK_BYTES) for n in (2, 0, 9)]
    assert claimed == [range(2), range(2, 3), range(3, 7)] and not read.num_unclaimed


def test_a_read_is_finished_after_all_pieces_in_any_order(target, source):
    read = CrossMemoryRead(
        PID, addresses(source, range(4)), addresses(target, range(4)), SMALL_BLOCK_BYTES, True
    )
    first, last = read.claim(SMALL_BLOCK_BYTES), read.claim(3 * SMALL_BLOCK_BYTES)
    for blocks in (last, first):
        assert read.finished() is None
        read.complete(len(blocks), read.copy(blocks))
    assert read.finished() == 4 * SMALL_BLOCK_BYTES
    assert read.checksums == [checksum(memoryview(source.blocks[i])) for i in range(4)]


def test_reads_of_few_blocks_overtake_those_of_many(target, source):
    reads = CrossMemoryReads()
    many, few = (
        CrossMemoryRead(
            PID, addresses(source, range(n)), addresses(target, range(n)), SMALL_BLOCK_BYTES, False
        )
        for n in (16, 2)
    )
    reads.add(many)
    reads.copy_piece(SMALL_BLOCK_BYTES)
    reads.add(few)
    reads.copy_piece(2 * SMALL_BLOCK_BYTES)
    assert few.finished() and many.num_unclaimed == 15


def test_a_read_is_in_progress_until_its_last_piece_is_copied(target, source, monkeypatch):
    reads, seen = CrossMemoryReads(), []
    read = CrossMemoryRead(
        PID, addresses(source, range(2)), addresses(target, range(2)), SMALL_BLOCK_BYTES, False
    )
    copy = read.copy
    monkeypatch.setattr(
        read, "copy", lambda blocks: seen.append((bool(reads), reads.in_progress)) or copy(blocks)
    )
    reads.add(read)
    while reads.in_progress:
        reads.copy_piece(SMALL_BLOCK_BYTES)
    assert seen == [(True, True), (False, True)] and read.finished()


def test_a_canceled_read_ends_with_the_pieces_that_are_being_copied(target, source):
    reads = CrossMemoryReads()
    read = CrossMemoryRead(
        PID, addresses(source, range(4)), addresses(target, range(4)), SMALL_BLOCK_BYTES, False
    )
    reads.add(read)
    blocks = read.claim(SMALL_BLOCK_BYTES)
    reads.cancel(read)
    assert read.finished() is None and not reads.copy_piece(SMALL_BLOCK_BYTES)
    read.complete(len(blocks), None)
    with pytest.raises(LinkError, match="canceled"):
        read.finished()
