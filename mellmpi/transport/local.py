"""All workers in one process: messages through queues, blocks by memmove from arena to arena."""

import select
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
class _PendingSend:
    """Blocks to send; the receiver copies them out of the sender's arena."""

    transfer: Transfer
    arena: Arena
    block_ids: deque[int]
    checksums: deque[int]  # of the blocks when the transfer began; empty: no checksums


@dataclass
class _PendingReceive:
    """Blocks to receive; without an arena they are discarded."""

    transfer: Transfer
    src: int
    tag: int
    arena: Arena | None
    block_ids: deque[int]


@dataclass
class _Inbox:
    messages: deque[tuple[int, bytes]] = field(default_factory=deque)
    sends: dict[tuple[int, int], deque[_PendingSend]] = field(default_factory=dict)  # (src, tag)
    bell: threading.Event = field(default_factory=threading.Event)


def _block(arena: Arena, block_id: int) -> memoryview:
    return bytes_at(arena.address + block_id * arena.block_bytes, arena.block_bytes)


class LocalNetwork:
    """The transports of one scheduler and `num_workers` workers that share a process."""

    def __init__(self, num_workers: int, checksums: bool = False):
        self.checksums = checksums
        self.lock = threading.RLock()  # each transport may be used by a thread of its own
        self.inboxes = [_Inbox() for _ in range(num_workers + 1)]
        self.lost: set[int] = set()
        self.transports = [LocalTransport(self, w) for w in range(num_workers + 1)]

    def lose(self, worker: int) -> None:
        """For tests: behave as if the process of this worker had been killed."""
        with self.lock:
            self.lost.add(worker)
            for address, inbox in enumerate(self.inboxes):
                if address != worker:
                    inbox.messages.append((worker, encode(WorkerLost(worker))))
                    inbox.bell.set()
            for transport in self.transports:
                transport.drop_peer(worker)


class LocalTransport:
    """One end of a LocalNetwork. Same contract as MPI, wire form of messages included."""

    def __init__(self, network: LocalNetwork, worker: int):
        self.worker = worker
        self.num_workers = len(network.inboxes) - 1
        self._network = network
        self._inbox = network.inboxes[worker]
        self._arena: Arena | None = None
        self._receives: list[_PendingReceive] = []
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
        receiving = [receive for receive in self._receives if receive.arena is not None]
        self._sending = self._unfinished_sends()
        assert not receiving and not self._sending, "transfers in progress use the arena"
        self._arena = arena

    def send_blocks(self, dst: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        assert self._arena is not None, "no arena attached"
        assert str(self._arena.device) == "cpu", "a LocalNetwork moves blocks in host memory only"
        transfer = Transfer()
        with self._network.lock:
            if dst in self._network.lost or not block_ids:
                if block_ids:
                    transfer.fail("peer lost")
                transfer.end()
                return transfer
            inbox = self._network.inboxes[dst]
            checksums = self._checksums(self._arena, block_ids)
            send = _PendingSend(transfer, self._arena, deque(block_ids), checksums)
            inbox.sends.setdefault((self.worker, tag), deque()).append(send)
            self._sending = [*self._unfinished_sends(), (dst, transfer)]
            inbox.bell.set()
        return transfer

    def _unfinished_sends(self) -> list[tuple[int, Transfer]]:
        return [(dst, t) for dst, t in self._sending if not t.done]

    def _checksums(self, arena: Arena, block_ids: Sequence[int]) -> deque[int]:
        if not self._network.checksums:
            return deque()
        return deque(checksum(_block(arena, i)) for i in block_ids)

    def receive_blocks(self, src: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        assert self._arena is not None, "no arena attached"
        return self._begin_receive(src, tag, self._arena, block_ids)

    def drain_blocks(self, src: int, tag: int, num_blocks: int) -> Transfer:
        return self._begin_receive(src, tag, None, range(num_blocks))

    def _begin_receive(
        self, src: int, tag: int, arena: Arena | None, block_ids: Sequence[int]
    ) -> Transfer:
        receive = _PendingReceive(Transfer(), src, tag, arena, deque(block_ids))
        with self._network.lock:
            self._receives.append(receive)
            if src in self._network.lost and not self._inbox.sends.get((src, tag)):
                receive.transfer.fail("peer lost")
                self._end(receive)
            elif not block_ids:
                self._end(receive)
        return receive.transfer

    def _end(self, receive: _PendingReceive) -> None:
        self._receives.remove(receive)
        receive.transfer.end()

    def progress(self) -> bool:
        moved = 0
        with self._network.lock:
            for receive in list(self._receives):
                while moved < PIECE_BYTES and (size := self._receive_block(receive)):
                    moved += size
        return moved > 0

    def _receive_block(self, receive: _PendingReceive) -> int:
        """Receive the next block of this transfer. Returns its bytes, 0 if nothing is sent."""
        sends = self._inbox.sends.get((receive.src, receive.tag))
        if not sends or receive.transfer.done:
            return 0
        send, size = sends[0], sends[0].arena.block_bytes
        self._copy(send, receive)
        receive.transfer.num_bytes += size
        send.transfer.num_bytes += size
        if not send.block_ids:  # both transfers end, even if the receiver expected more blocks
            sends.popleft()
            if not sends:
                del self._inbox.sends[receive.src, receive.tag]
            send.transfer.end()
            self._network.inboxes[receive.src].bell.set()
            if receive.block_ids and receive.arena is not None:
                receive.transfer.fail("truncated")
            self._end(receive)
        return size

    def _copy(self, send: _PendingSend, receive: _PendingReceive) -> None:
        """Copy the next block to its destination, or discard it."""
        block_id = send.block_ids.popleft()
        expected = send.checksums.popleft() if send.checksums else None
        into = receive.block_ids.popleft() if receive.block_ids else None
        if receive.arena is None:
            return
        if into is None or receive.arena.block_bytes != send.arena.block_bytes:
            receive.transfer.fail("size")
            return
        block = _block(receive.arena, into)
        block[:] = _block(send.arena, block_id)
        if expected is not None and checksum(block) != expected:
            receive.transfer.fail("checksum")

    def wait(self, timeout_s: float, descriptors: Sequence[int] = ()) -> None:
        if not self._inbox.messages and not self.progress():
            if descriptors and not self._inbox.bell.is_set():  # all peers share this thread
                select.select(descriptors, [], [], timeout_s)
            else:
                self._inbox.bell.wait(timeout_s)
        self._inbox.bell.clear()

    def wake(self) -> None:
        self._inbox.bell.set()

    def drop_peer(self, worker: int) -> None:
        """End all transfers from and to a lost worker. The caller holds the network's lock."""
        for tag in [key for key in self._inbox.sends if key[0] == worker]:
            for send in self._inbox.sends.pop(tag):
                send.transfer.fail("peer lost")
                send.transfer.end()
        for receive in [r for r in self._receives if r.src == worker]:
            receive.transfer.fail("peer lost")
            self._end(receive)
        for dst, transfer in self._sending:
            if dst == worker and not transfer.done:
                transfer.fail("peer lost")
                transfer.end()

    def close(self) -> None:
        with self._network.lock:
            for receive in list(self._receives):
                receive.transfer.fail("peer lost")
                self._end(receive)
