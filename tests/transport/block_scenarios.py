"""Scenarios of blocks, see `conformance`."""

import random
from collections import deque

import numpy as np

from mellmpi.protocol import ROUNDS, Cancel
from tests.transport.participant import BLOCK_BYTES, HostArena, Participant


def blocks_arrive_in_the_right_places_bit_for_bit(participant: Participant) -> None:
    t = participant.transport
    arena, rng = HostArena(64), random.Random(5)
    out, into = (rng.sample(range(64), 40) for _ in range(2))
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        t.send(2, Cancel(0, "gone"))
        transfer = t.send_blocks(2, 7, out)
        participant.finish(transfer)
        assert not transfer.failed and transfer.num_bytes == 40 * BLOCK_BYTES
    if t.worker == 2:
        arena.fill(2)
        before = arena.blocks.copy()
        participant.next(1)
        transfer = t.receive_blocks(1, 7, into)
        participant.finish(transfer)
        source = HostArena(64)
        source.fill(1)
        before[into] = source.blocks[out]
        assert np.array_equal(arena.blocks, before)
        assert not transfer.failed and transfer.num_bytes == 40 * BLOCK_BYTES
        assert transfer.elapsed_s > 0
    t.attach(None)


def a_receive_may_be_posted_before_the_blocks_are_sent(participant: Participant) -> None:
    t = participant.transport
    arena = HostArena(8)
    t.attach(arena)
    if t.worker == 2:
        transfer = t.receive_blocks(3, 1, range(8))
        assert not t.progress() and not transfer.done
        t.send(3, Cancel(0, "gone"))
        participant.finish(transfer)
        source = HostArena(8)
        source.fill(3)
        assert np.array_equal(arena.blocks, source.blocks)
    if t.worker == 3:
        arena.fill(3)
        participant.next(2)
        participant.finish(t.send_blocks(2, 1, range(8)))
    t.attach(None)


def transfers_with_different_tags_do_not_mix(participant: Participant) -> None:
    """Every worker sends to every other one under four tags. The receive order is different."""
    t = participant.transport
    others = [w for w in range(1, t.num_workers + 1) if w != t.worker]
    tags = [3, 2**33 + 1, 11, 0]
    arena = HostArena(16 * t.num_workers, 9_000)
    t.attach(arena)
    if t.worker != 0:
        arena.fill(t.worker)
        expected = arena.blocks.copy()
        transfers = [
            t.send_blocks(dst, tag, range(4 * i, 4 * i + 4))
            for dst in others
            for i, tag in enumerate(tags)
        ]
        free = deque(range(16, 16 * t.num_workers))  # blocks 0 … 15 are being sent
        for src in others:
            sent = HostArena(16 * t.num_workers, 9_000)
            sent.fill(src)
            for i in (2, 0, 3, 1):
                into = [free.pop() for _ in range(4)]
                transfers.append(t.receive_blocks(src, tags[i], into))
                expected[into] = sent.blocks[4 * i : 4 * i + 4]
        participant.finish(*transfers)
        assert np.array_equal(arena.blocks, expected)
    t.attach(None)


def two_transfers_of_one_tag_arrive_one_after_the_other(participant: Participant) -> None:
    t = participant.transport
    arena = HostArena(40, 1_000_000)
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        participant.finish(t.send_blocks(2, 4, range(20)), t.send_blocks(2, 4, range(20, 40)))
    if t.worker == 2:
        participant.finish(t.receive_blocks(1, 4, range(20)), t.receive_blocks(1, 4, range(20, 40)))
        source = HostArena(40, 1_000_000)
        source.fill(1)
        assert np.array_equal(arena.blocks, source.blocks)
    t.attach(None)


def a_drain_does_not_affect_other_transfers(participant: Participant) -> None:
    t = participant.transport
    arena = HostArena(30)
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        participant.finish(t.send_blocks(2, 9, range(20)), t.send_blocks(2, 9, range(20, 30)))
    if t.worker == 2:
        t.attach(None)  # a drain needs no arena
        drain = t.drain_blocks(1, 9, 20)
        t.attach(arena)
        receive = t.receive_blocks(1, 9, range(10))
        participant.finish(drain, receive)
        source = HostArena(30)
        source.fill(1)
        assert drain.num_bytes == 20 * BLOCK_BYTES and not drain.failed
        assert np.array_equal(arena.blocks[:10], source.blocks[20:]) and not arena.blocks[10:].any()
    t.attach(None)


def a_transfer_with_another_block_size_fails_and_leaves_nothing_behind(
    participant: Participant,
) -> None:
    t = participant.transport
    arena = HostArena(12, 20_000 if t.worker == 2 else 30_000 if t.worker == 1 else 10_000)
    t.attach(arena)
    if t.worker in (1, 3):
        participant.finish(t.send_blocks(2, 6, range(12)))
        participant.finish(t.send_blocks(2, 6, range(12)))
    if t.worker == 2:
        too_long, too_short = t.receive_blocks(1, 6, range(12)), t.receive_blocks(3, 6, range(12))
        rest = [t.drain_blocks(1, 6, 12), t.drain_blocks(3, 6, 12)]
        participant.finish(too_long, too_short, *rest)
        assert too_long.reason == too_short.reason == "size" and not any(r.failed for r in rest)
    t.attach(None)


def a_transfer_shorter_or_longer_than_expected_fails_and_affects_no_other(
    participant: Participant,
) -> None:
    t = participant.transport
    arena = HostArena(32)
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        transfers = [t.send_blocks(2, 6, range(7)), t.send_blocks(2, 7, range(13))]
        transfers += [t.send_blocks(2, tag, range(20, 30)) for tag in (6, 7)]
        participant.finish(*transfers)
        assert not any(transfer.failed for transfer in transfers)
        assert isinstance(participant.next(2), Cancel)
    if t.worker == 2:
        shorter, longer = t.receive_blocks(1, 6, range(10)), t.receive_blocks(1, 7, range(10))
        participant.finish(shorter, longer)
        assert (shorter.reason, longer.reason) == ("truncated", "size")
        after = [t.receive_blocks(1, 6, range(10, 20)), t.receive_blocks(1, 7, range(20, 30))]
        participant.finish(*after)
        source = HostArena(32)
        source.fill(1)
        assert not any(transfer.failed for transfer in after)
        for first in (10, 20):
            assert np.array_equal(arena.blocks[first : first + 10], source.blocks[20:30])
        t.send(1, Cancel(0, "gone"))
    t.attach(None)


def a_drain_receives_all_blocks_of_a_transfer_whatever_its_size(participant: Participant) -> None:
    t = participant.transport
    arena = HostArena(12)
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        participant.finish(*[t.send_blocks(2, 8, range(n)) for n in (3, 12, 5)])
    if t.worker == 2:
        drains = [t.drain_blocks(1, 8, 5), t.drain_blocks(1, 8, 5)]
        receive = t.receive_blocks(1, 8, range(5))
        participant.finish(*drains, receive)
        assert [drain.num_bytes for drain in drains] == [3 * BLOCK_BYTES, 12 * BLOCK_BYTES]
        assert not receive.failed
    t.attach(None)


def a_flipped_bit_is_detected_and_affects_no_other_transfer(participant: Participant) -> None:
    t = participant.transport
    arena = HostArena(8, 500_000)  # more than any transport copies at once
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        transfers = [t.send_blocks(2, 4, range(4)), t.send_blocks(2, 5, range(4, 8))]
        transfers.append(t.send_blocks(3, 5, range(4, 8)))
        participant.next(3)  # it has received a later transfer, so the checksums are computed
        arena.blocks[2, -1] ^= 16
        t.send(2, Cancel(0, "gone"))
        participant.finish(*transfers)
    if t.worker == 3:
        participant.finish(t.receive_blocks(1, 5, range(4)))
        t.send(1, Cancel(0, "gone"))
    if t.worker == 2:
        participant.next(1)
        flipped, intact = t.receive_blocks(1, 4, range(4)), t.receive_blocks(1, 5, range(4, 8))
        participant.finish(flipped, intact)
        assert flipped.reason == "checksum" and not intact.failed
    t.attach(None)


def all_rounds_of_a_migration_may_be_in_flight_at_once(participant: Participant) -> None:
    """They are received or drained in the order of their headers, also with large epochs."""
    t = participant.transport
    arena, epochs = HostArena(60, 9_000), [2**26, 2**26 + 512, 2**26 + 1024]
    tags = [ROUNDS * epoch + i for i in range(5) for epoch in epochs]  # many are equal modulo 2**15
    rounds = [(tag, range(4 * i, 4 * i + 4 - i % 3)) for i, tag in enumerate(tags)]
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        participant.finish(*[t.send_blocks(2, tag, ids) for tag, ids in rounds])
    if t.worker == 2:
        transfers = [
            t.drain_blocks(1, tag, len(ids)) if i % 4 == 1 else t.receive_blocks(1, tag, ids)
            for i, (tag, ids) in enumerate(rounds)
        ]
        participant.finish(*transfers)
        source, expected = HostArena(60, 9_000), HostArena(60, 9_000)
        source.fill(1)
        for _, ids in (r for i, r in enumerate(rounds) if i % 4 != 1):
            expected.blocks[list(ids)] = source.blocks[list(ids)]
        assert np.array_equal(arena.blocks, expected.blocks)
        assert not any(transfer.failed for transfer in transfers)
    t.attach(None)


def an_empty_transfer_is_done_at_once(participant: Participant) -> None:
    t = participant.transport
    t.attach(HostArena(1))
    if t.worker == 1:
        assert t.send_blocks(2, 1, []).done and t.receive_blocks(2, 1, []).done
        assert t.drain_blocks(2, 1, 0).done and not t.progress()
    t.attach(None)


def the_arena_cannot_be_detached_during_a_transfer(participant: Participant) -> None:
    t = participant.transport
    arena = HostArena(2)
    t.attach(arena)
    if t.worker == 1:
        transfer = t.receive_blocks(2, 3, [0, 1])
        try:
            t.attach(None)
        except AssertionError:
            t.send(2, Cancel(0, "gone"))
        participant.finish(transfer)
    if t.worker == 2:
        participant.next(1)
        participant.finish(t.send_blocks(1, 3, [1, 0]))
    t.attach(None)
