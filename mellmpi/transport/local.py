"""All workers in one process: messages through queues, blocks by memmove from arena to arena."""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mellmpi.protocol import WorkerLost, decode, encode
from mellmpi.transport.base import Arena, Transfer
from mellmpi.transport.blocks import bytes_at, checksum

PIECE_BYTES = 32 << 20  # copied by one progress() call, or one block if that is larger


@dataclass
class _Offer:
    """Blocks a worker wants to send; read in place when the receiver asks for them."""

    transfer: Transfer
    arena: Arena
    block_ids: deque[int]
    checksums: deque[int]  # of what they held when the sending began; empty: nothing is checked


@dataclass
class _Want:
    """Blocks a worker wants to receive; no arena: to be thrown away."""

    transfer: Transfer
    src: int
    tag: int
    arena: Arena | None
    block_ids: deque[int]


@dataclass
class _Inbox:
    messages: deque[tuple[int, Any]] = field(default_factory=deque)
    offers: dict[tuple[int, int], deque[_Offer]] = field(default_factory=dict)  # by (src, tag)
    bell: threading.Event = field(default_factory=threading.Event)


def _block(arena: Arena, block_id: int) -> memoryview:
    return bytes_at(arena.address + block_id * arena.block_bytes, arena.block_bytes)


class LocalNetwork:
    """The transports of one scheduler and `num_workers` workers that share a process."""

    def __init__(self, num_workers: int, checksums: bool = False):
        self.checksums = checksums
        self.lock = threading.RLock()  # transports may run in threads of their own
        self.inboxes = [_Inbox() for _ in range(num_workers + 1)]
        self.lost: set[int] = set()
        self.transports = [LocalTransport(self, w) for w in range(num_workers + 1)]

    def lose(self, worker: int) -> None:
        """As if the worker's process had been killed: for tests of whatever runs on top."""
        with self.lock:
            self.lost.add(worker)
            for address, inbox in enumerate(self.inboxes):
                if address != worker:
                    inbox.messages.append((worker, encode(WorkerLost(worker))))
                    inbox.bell.set()
            for transport in self.transports:
                transport.forget(worker)


class LocalTransport:
    """One end of a LocalNetwork. Same contract as MPI, wire form included."""

    def __init__(self, network: LocalNetwork, worker: int):
        self.worker = worker
        self.num_workers = len(network.inboxes) - 1
        self._network = network
        self._inbox = network.inboxes[worker]
        self._arena: Arena | None = None
        self._wants: list[_Want] = []
        self._sending: list[tuple[int, Transfer]] = []  # (destination, transfer)

    def send(self, dst: int, message: Any) -> None:
        if dst in self._network.lost or self.worker in self._network.lost:
            return
        inbox = self._network.inboxes[dst]
        inbox.messages.append((self.worker, encode(message)))
        inbox.bell.set()

    def poll(self) -> list[tuple[int, Any]]:
        messages = self._inbox.messages
        return [
            (src, decode(data)) for src, data in (messages.popleft() for _ in range(len(messages)))
        ]

    def unread(self, messages: list[tuple[int, Any]]) -> None:
        for src, message in reversed(messages):
            self._inbox.messages.appendleft((src, encode(message)))
        self._inbox.bell.set()

    def attach(self, arena: Arena | None) -> None:
        busy = [want for want in self._wants if want.arena is not None]
        self._sending = self._under_way()
        assert not busy and not self._sending, "blocks are under way; the arena cannot go"
        self._arena = arena

    def send_blocks(self, dst: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        assert self._arena is not None, "no arena attached"
        assert str(self._arena.device) == "cpu", "workers on devices are processes of their own"
        transfer = Transfer()
        with self._network.lock:
            if dst in self._network.lost or not block_ids:
                if block_ids:
                    transfer.fail("peer lost")
                transfer.end()
                return transfer
            inbox = self._network.inboxes[dst]
            checksums = self._checksums(self._arena, block_ids)
            offer = _Offer(transfer, self._arena, deque(block_ids), checksums)
            inbox.offers.setdefault((self.worker, tag), deque()).append(offer)
            self._sending = [*self._under_way(), (dst, transfer)]
            inbox.bell.set()
        return transfer

    def _under_way(self) -> list[tuple[int, Transfer]]:
        return [(dst, t) for dst, t in self._sending if not t.done]

    def _checksums(self, arena: Arena, block_ids: Sequence[int]) -> deque[int]:
        if not self._network.checksums:
            return deque()
        return deque(checksum(_block(arena, i)) for i in block_ids)

    def receive_blocks(self, src: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        assert self._arena is not None, "no arena attached"
        return self._want(src, tag, self._arena, block_ids)

    def drain_blocks(self, src: int, tag: int, num_blocks: int) -> Transfer:
        return self._want(src, tag, None, range(num_blocks))

    def _want(self, src: int, tag: int, arena: Arena | None, block_ids: Sequence[int]) -> Transfer:
        want = _Want(Transfer(), src, tag, arena, deque(block_ids))
        with self._network.lock:
            self._wants.append(want)
            if src in self._network.lost and not self._inbox.offers.get((src, tag)):
                want.transfer.fail("peer lost")
                self._end(want)
            elif not block_ids:
                self._end(want)
        return want.transfer

    def _end(self, want: _Want) -> None:
        self._wants.remove(want)
        want.transfer.end()

    def progress(self) -> bool:
        moved = 0
        with self._network.lock:
            for want in list(self._wants):
                while moved < PIECE_BYTES and (size := self._take_one(want)):
                    moved += size
        return moved > 0

    def _take_one(self, want: _Want) -> int:
        """Take in the next block of this transfer; its bytes, or 0 if none has come."""
        offers = self._inbox.offers.get((want.src, want.tag))
        if not offers or want.transfer.done:
            return 0
        offer, size = offers[0], offers[0].arena.block_bytes
        self._copy(offer, want)
        want.transfer.num_bytes += size
        offer.transfer.num_bytes += size
        if not offer.block_ids:  # one transfer there is one here, whatever was announced
            offers.popleft()
            if not offers:
                del self._inbox.offers[want.src, want.tag]
            offer.transfer.end()
            self._network.inboxes[want.src].bell.set()
            if want.block_ids and want.arena is not None:
                want.transfer.fail("truncated")
            self._end(want)
        return size

    def _copy(self, offer: _Offer, want: _Want) -> None:
        """The next block of an offer to where it is wanted, if it is."""
        block_id = offer.block_ids.popleft()
        expected = offer.checksums.popleft() if offer.checksums else None
        into = want.block_ids.popleft() if want.block_ids else None
        if want.arena is None:
            return
        if into is None or want.arena.block_bytes != offer.arena.block_bytes:
            want.transfer.fail("size")
            return
        block = _block(want.arena, into)
        block[:] = _block(offer.arena, block_id)
        if expected is not None and checksum(block) != expected:
            want.transfer.fail("checksum")

    def wait(self, timeout_s: float) -> None:
        if not self._inbox.messages and not self.progress():
            self._inbox.bell.wait(timeout_s)
        self._inbox.bell.clear()

    def wake(self) -> None:
        self._inbox.bell.set()

    def forget(self, worker: int) -> None:
        """End what can no longer come from, or go to, a lost worker. Under the network's lock."""
        for tag in [key for key in self._inbox.offers if key[0] == worker]:
            for offer in self._inbox.offers.pop(tag):
                offer.transfer.fail("peer lost")
                offer.transfer.end()
        for want in [w for w in self._wants if w.src == worker]:
            want.transfer.fail("peer lost")
            self._end(want)
        for dst, transfer in self._sending:
            if dst == worker and not transfer.done:
                transfer.fail("peer lost")
                transfer.end()

    def close(self) -> None:
        with self._network.lock:
            for want in list(self._wants):
                want.transfer.fail("peer lost")
                self._end(want)
