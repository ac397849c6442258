"""What every transport must do, as programs that all addresses of one job run together.

A scenario is called at every address, 0 included, with that address's transport. It needs at
least three workers. It must leave nothing behind: scenarios run one after the other.
"""

import random
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from mellmpi.protocol import ROUNDS, Cancel, KvReserved, Parked, Request, Sampling, Submit, Wake
from mellmpi.transport import Transfer, Transport

LIMIT_S = 20.0  # for one thing to come; far more than it takes
BLOCK_BYTES = 40_000  # above the eager limit of MPI, and no multiple of a page


class HostArena:
    """Blocks in ordinary memory."""

    device = "cpu"

    def __init__(self, num_blocks: int, block_bytes: int = BLOCK_BYTES):
        self.blocks = np.zeros((num_blocks, block_bytes), np.uint8)
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.address = self.blocks.ctypes.data

    def fill(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.blocks[:] = rng.integers(0, 256, self.blocks.shape, np.uint8)


class Post:
    """Receives message by message; keeps what came too early."""

    def __init__(self, transport: Transport):
        self.transport = transport
        self._came: dict[int, deque[Any]] = defaultdict(deque)

    def _poll(self) -> None:
        for src, message in self.transport.poll():
            self._came[src].append(message)

    def next(self, src: int) -> Any:
        """The next message from `src`; fails after LIMIT_S."""
        deadline_s = time.monotonic() + LIMIT_S
        while not self._came[src]:
            assert time.monotonic() < deadline_s, f"nothing came from {src} in {LIMIT_S} s"
            self.transport.progress()
            self.transport.wait(0.05)
            self._poll()
        return self._came[src].popleft()

    def finish(self, *transfers: Transfer) -> None:
        """Drive these transfers to their end."""
        deadline_s = time.monotonic() + LIMIT_S
        while not all(t.done for t in transfers):
            assert time.monotonic() < deadline_s, "a transfer does not end"
            self._poll()
            if not self.transport.progress():
                self.transport.wait(0.05)

    def meet(self) -> None:
        """All addresses that are alive come to this point before any goes on."""
        if self.transport.worker == 0:
            workers = range(1, self.transport.num_workers + 1)
            for worker in workers:
                assert isinstance(self.next(worker), Parked)
            for worker in workers:
                self.transport.send(worker, Wake())
        else:
            self.transport.send(0, Parked(0))
            assert isinstance(self.next(0), Wake)


def _request(id: int, num_tokens: int) -> Request:
    rng = random.Random(id)
    prompt = tuple(rng.randrange(50_000) for _ in range(num_tokens))
    sampling = Sampling(1, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 2**64 - 1, (), None)
    return Request(id, "model", prompt, sampling, None)


def messages_of_a_link_arrive_in_order(post: Post) -> None:
    t = post.transport
    everyone = range(t.num_workers + 1)
    for i in range(300):
        for dst in everyone:
            if dst != t.worker:
                t.send(dst, KvReserved(i, t.worker, 0))
    for src in everyone:
        if src != t.worker:
            got = [post.next(src) for _ in range(300)]
            assert got == [KvReserved(i, src, 0) for i in range(300)]


def big_messages_arrive_whole_and_keep_their_place(post: Post) -> None:
    t = post.transport
    if t.worker == 1:
        for i in range(4):
            t.send(2, Cancel(i, "gone"))
            t.send(2, Submit(_request(i, 100_000)))
        t.send(2, Cancel(4, "gone"))
    if t.worker == 2:
        for i in range(4):
            assert post.next(1) == Cancel(i, "gone")
            assert post.next(1) == Submit(_request(i, 100_000))
        assert post.next(1) == Cancel(4, "gone")


def many_may_send_to_one_at_once(post: Post) -> None:
    t = post.transport
    if t.worker != 0:
        for i in range(1000):
            t.send(0, Cancel(i, "gone"))
        return
    for src in range(1, t.num_workers + 1):
        assert [post.next(src) for _ in range(1000)] == [Cancel(i, "gone") for i in range(1000)]


def all_may_send_before_any_receives(post: Post) -> None:
    """With sends that wait for their receiver this stands still for ever."""
    t = post.transport
    others = [w for w in range(t.num_workers + 1) if w != t.worker]
    big = _request(t.worker, 100_000)
    for dst in others * 5:
        t.send(dst, Submit(big))
    for src in others:
        expected = Submit(_request(src, 100_000))
        assert all(post.next(src) == expected for _ in range(5))


def blocks_land_where_they_belong_bit_for_bit(post: Post) -> None:
    t = post.transport
    arena, rng = HostArena(64), random.Random(5)
    out, into = (rng.sample(range(64), 40) for _ in range(2))
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        t.send(2, Cancel(0, "gone"))
        transfer = t.send_blocks(2, 7, out)
        post.finish(transfer)
        assert not transfer.failed and transfer.num_bytes == 40 * BLOCK_BYTES
    if t.worker == 2:
        arena.fill(2)
        before = arena.blocks.copy()
        post.next(1)
        transfer = t.receive_blocks(1, 7, into)
        post.finish(transfer)
        source = HostArena(64)
        source.fill(1)
        before[into] = source.blocks[out]
        assert np.array_equal(arena.blocks, before)
        assert not transfer.failed and transfer.num_bytes == 40 * BLOCK_BYTES
        assert transfer.elapsed_s > 0
    t.attach(None)


def a_receive_may_be_posted_before_the_blocks_are_sent(post: Post) -> None:
    t = post.transport
    arena = HostArena(8)
    t.attach(arena)
    if t.worker == 2:
        transfer = t.receive_blocks(3, 1, range(8))
        assert not t.progress() and not transfer.done
        t.send(3, Cancel(0, "gone"))
        post.finish(transfer)
        source = HostArena(8)
        source.fill(3)
        assert np.array_equal(arena.blocks, source.blocks)
    if t.worker == 3:
        arena.fill(3)
        post.next(2)
        post.finish(t.send_blocks(2, 1, range(8)))
    t.attach(None)


def transfers_with_different_tags_do_not_mix(post: Post) -> None:
    """Every worker sends to every other under four tags, received in another order than sent."""
    t = post.transport
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
        post.finish(*transfers)
        assert np.array_equal(arena.blocks, expected)
    t.attach(None)


def two_transfers_of_one_tag_arrive_one_after_the_other(post: Post) -> None:
    t = post.transport
    arena = HostArena(40, 1_000_000)
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        post.finish(t.send_blocks(2, 4, range(20)), t.send_blocks(2, 4, range(20, 40)))
    if t.worker == 2:
        post.finish(t.receive_blocks(1, 4, range(20)), t.receive_blocks(1, 4, range(20, 40)))
        source = HostArena(40, 1_000_000)
        source.fill(1)
        assert np.array_equal(arena.blocks, source.blocks)
    t.attach(None)


def drained_blocks_disturb_nothing(post: Post) -> None:
    t = post.transport
    arena = HostArena(30)
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        post.finish(t.send_blocks(2, 9, range(20)), t.send_blocks(2, 9, range(20, 30)))
    if t.worker == 2:
        t.attach(None)  # a drain needs no arena
        drain = t.drain_blocks(1, 9, 20)
        t.attach(arena)
        receive = t.receive_blocks(1, 9, range(10))
        post.finish(drain, receive)
        source = HostArena(30)
        source.fill(1)
        assert drain.num_bytes == 20 * BLOCK_BYTES and not drain.failed
        assert np.array_equal(arena.blocks[:10], source.blocks[20:]) and not arena.blocks[10:].any()
    t.attach(None)


def blocks_of_another_size_end_as_failed_and_leave_nothing_behind(post: Post) -> None:
    t = post.transport
    arena = HostArena(12, 20_000 if t.worker == 2 else 30_000 if t.worker == 1 else 10_000)
    t.attach(arena)
    if t.worker in (1, 3):
        post.finish(t.send_blocks(2, 6, range(12)))
        post.finish(t.send_blocks(2, 6, range(12)))
    if t.worker == 2:
        too_long, too_short = t.receive_blocks(1, 6, range(12)), t.receive_blocks(3, 6, range(12))
        rest = [t.drain_blocks(1, 6, 12), t.drain_blocks(3, 6, 12)]
        post.finish(too_long, too_short, *rest)
        assert too_long.reason == too_short.reason == "size" and not any(r.failed for r in rest)
    t.attach(None)


def a_stream_shorter_or_longer_than_announced_fails_and_disturbs_no_other(post: Post) -> None:
    t = post.transport
    arena = HostArena(32)
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        transfers = [t.send_blocks(2, 6, range(7)), t.send_blocks(2, 7, range(13))]
        transfers += [t.send_blocks(2, tag, range(20, 30)) for tag in (6, 7)]
        post.finish(*transfers)
        assert not any(transfer.failed for transfer in transfers)
        assert isinstance(post.next(2), Cancel)
    if t.worker == 2:
        shorter, longer = t.receive_blocks(1, 6, range(10)), t.receive_blocks(1, 7, range(10))
        post.finish(shorter, longer)
        assert (shorter.reason, longer.reason) == ("truncated", "size")
        after = [t.receive_blocks(1, 6, range(10, 20)), t.receive_blocks(1, 7, range(20, 30))]
        post.finish(*after)
        source = HostArena(32)
        source.fill(1)
        assert not any(transfer.failed for transfer in after)
        for first in (10, 20):
            assert np.array_equal(arena.blocks[first : first + 10], source.blocks[20:30])
        t.send(1, Cancel(0, "gone"))
    t.attach(None)


def a_drain_takes_in_what_was_sent_whatever_was_announced(post: Post) -> None:
    t = post.transport
    arena = HostArena(12)
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        post.finish(*[t.send_blocks(2, 8, range(n)) for n in (3, 12, 5)])
    if t.worker == 2:
        drains = [t.drain_blocks(1, 8, 5), t.drain_blocks(1, 8, 5)]
        receive = t.receive_blocks(1, 8, range(5))
        post.finish(*drains, receive)
        assert [drain.num_bytes for drain in drains] == [3 * BLOCK_BYTES, 12 * BLOCK_BYTES]
        assert not receive.failed
    t.attach(None)


def a_bit_that_flips_on_the_way_is_found_and_no_other_transfer_suffers(post: Post) -> None:
    t = post.transport
    arena = HostArena(8, 500_000)  # far beyond what any transport copies at once
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        transfers = [t.send_blocks(2, 4, range(4)), t.send_blocks(2, 5, range(4, 8))]
        transfers.append(t.send_blocks(3, 5, range(4, 8)))
        post.next(3)  # it has what was sent after: the checksums are made
        arena.blocks[2, -1] ^= 16
        t.send(2, Cancel(0, "gone"))
        post.finish(*transfers)
    if t.worker == 3:
        post.finish(t.receive_blocks(1, 5, range(4)))
        t.send(1, Cancel(0, "gone"))
    if t.worker == 2:
        post.next(1)
        flipped, whole = t.receive_blocks(1, 4, range(4)), t.receive_blocks(1, 5, range(4, 8))
        post.finish(flipped, whole)
        assert flipped.reason == "checksum" and not whole.failed
    t.attach(None)


def rounds_of_one_migration_may_all_be_under_way_together(post: Post) -> None:
    """Received or drained in the order of their headers; epochs are large after a long run."""
    t = post.transport
    arena, epochs = HostArena(60, 9_000), [2**26, 2**26 + 512, 2**26 + 1024]
    tags = [ROUNDS * epoch + i for i in range(5) for epoch in epochs]  # many are alike modulo 2**15
    rounds = [(tag, range(4 * i, 4 * i + 4 - i % 3)) for i, tag in enumerate(tags)]
    t.attach(arena)
    if t.worker == 1:
        arena.fill(1)
        post.finish(*[t.send_blocks(2, tag, ids) for tag, ids in rounds])
    if t.worker == 2:
        transfers = [
            t.drain_blocks(1, tag, len(ids)) if i % 4 == 1 else t.receive_blocks(1, tag, ids)
            for i, (tag, ids) in enumerate(rounds)
        ]
        post.finish(*transfers)
        source, expected = HostArena(60, 9_000), HostArena(60, 9_000)
        source.fill(1)
        for _, ids in (r for i, r in enumerate(rounds) if i % 4 != 1):
            expected.blocks[list(ids)] = source.blocks[list(ids)]
        assert np.array_equal(arena.blocks, expected.blocks)
        assert not any(transfer.failed for transfer in transfers)
    t.attach(None)


def an_empty_transfer_is_done_at_once(post: Post) -> None:
    t = post.transport
    t.attach(HostArena(1))
    if t.worker == 1:
        assert t.send_blocks(2, 1, []).done and t.receive_blocks(2, 1, []).done
        assert t.drain_blocks(2, 1, 0).done and not t.progress()
    t.attach(None)


def wake_ends_a_wait_that_comes_after_it(post: Post) -> None:
    started_s = time.monotonic()
    for _ in range(3):
        post.transport.wake()
        post.transport.wait(LIMIT_S)
    assert time.monotonic() - started_s < LIMIT_S


def the_arena_cannot_go_while_blocks_are_under_way(post: Post) -> None:
    t = post.transport
    arena = HostArena(2)
    t.attach(arena)
    if t.worker == 1:
        transfer = t.receive_blocks(2, 3, [0, 1])
        try:
            t.attach(None)
        except AssertionError:
            t.send(2, Cancel(0, "gone"))
        post.finish(transfer)
    if t.worker == 2:
        post.next(1)
        post.finish(t.send_blocks(1, 3, [1, 0]))
    t.attach(None)


SCENARIOS: list[Callable[[Post], None]] = [
    messages_of_a_link_arrive_in_order,
    big_messages_arrive_whole_and_keep_their_place,
    many_may_send_to_one_at_once,
    all_may_send_before_any_receives,
    blocks_land_where_they_belong_bit_for_bit,
    a_receive_may_be_posted_before_the_blocks_are_sent,
    transfers_with_different_tags_do_not_mix,
    two_transfers_of_one_tag_arrive_one_after_the_other,
    drained_blocks_disturb_nothing,
    blocks_of_another_size_end_as_failed_and_leave_nothing_behind,
    a_stream_shorter_or_longer_than_announced_fails_and_disturbs_no_other,
    a_drain_takes_in_what_was_sent_whatever_was_announced,
    a_bit_that_flips_on_the_way_is_found_and_no_other_transfer_suffers,
    rounds_of_one_migration_may_all_be_under_way_together,
    an_empty_transfer_is_done_at_once,
    wake_ends_a_wait_that_comes_after_it,
    the_arena_cannot_go_while_blocks_are_under_way,
]
