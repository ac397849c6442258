"""A channel and a doorbell without MPI. The test decides which messages arrive and when."""

import ctypes
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mellmpi.transport.channel import LinkError


@dataclass
class FakeRequest:
    kind: str  # "send" or "receive"
    peer: int
    tag: int
    address: int = 0
    num_bytes: int = 0
    done: bool = False
    received: int | None = None  # bytes received
    used_up: bool = False


@dataclass
class FakeChannel:
    """One end of a channel. The test sets the messages to receive and the completion of sends."""

    num_tags = 1 << 15  # the minimum of MPI_TAG_UB

    requests: list[FakeRequest] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    waiting: dict[tuple[int, int], deque[bytes]] = field(default_factory=lambda: defaultdict(deque))
    eager: int = 0  # bytes: sends up to this size complete at once
    slow: bool = False  # receives do not complete by themselves
    inbox: deque[tuple[int, bytes]] = field(default_factory=deque)
    last_messages: list[tuple[int, bytes]] = field(default_factory=list)  # arrive with `failures`
    failures: list[int] = field(default_factory=list)
    error: Exception | None = None
    num_probes: int = 0
    stuck: bool = False  # sends of messages do not complete

    def _post(self, *args: Any) -> FakeRequest:
        request = FakeRequest(*args)
        if request.peer in self.lost:
            raise LinkError("lost")
        self.requests.append(request)
        return request

    def send(self, address: int, num_bytes: int, dst: int, tag: int) -> FakeRequest:
        request = self._post("send", dst, tag, address, num_bytes)
        request.done = 0 < num_bytes <= self.eager
        return request

    def match(self, src: int, tag: int) -> tuple[Any, int] | None:
        if src in self.lost:
            raise LinkError("lost")
        self._deliver()
        if not self.waiting[src, tag]:
            return None
        data = self.waiting[src, tag].popleft()
        return (src, tag, data), len(data)

    def receive_matched(self, message: Any, src: int, address: int, num_bytes: int) -> FakeRequest:
        src, tag, data = message
        request = self._post("receive", src, tag, address, num_bytes)
        assert num_bytes == len(data)
        self._fill(request, data)
        return request

    def receive(self, address: int, num_bytes: int, src: int, tag: int) -> FakeRequest:
        return self._post("receive", src, tag, address, num_bytes)

    def _deliver(self) -> None:
        """Match each message with the oldest receive of its tag."""
        for request in self.requests:
            data = self.waiting[request.peer, request.tag]
            if request.kind == "receive" and request.received is None and not request.done and data:
                self._fill(request, data.popleft())

    def _fill(self, request: FakeRequest, data: bytes) -> None:
        assert len(data) <= request.num_bytes, "Open MPI would write past the end of the buffer"
        ctypes.memmove(request.address, data, len(data))
        request.received, request.done = len(data), not self.slow

    def finished(self, request: FakeRequest) -> int | None:
        self._deliver()
        return (request.received or 0) if self.test(request) else None

    def cancel(self, request: FakeRequest) -> None:
        request.done = request.done or request.received is None

    def test(self, request: FakeRequest) -> bool:
        assert not request.used_up, "tested after completion"
        if not request.done and request.peer not in self.lost:
            return False
        request.used_up = True
        if not request.done:
            raise LinkError("lost")
        return True

    def pending(self, kind: str) -> list[FakeRequest]:
        return [r for r in self.requests if r.kind == kind and not r.used_up]

    def send_bytes(self, data: bytes, dst: int) -> FakeRequest:
        request = self._post("send", dst, 0, 0, len(data))
        request.done = not self.stuck
        return request

    def take(self) -> tuple[int, bytearray, FakeRequest] | None:
        self.num_probes += 1
        if not self.inbox:
            return None
        src, data = self.inbox.popleft()
        return src, bytearray(data), FakeRequest("receive", src, 0, 0, len(data), done=True)

    def newly_failed(self) -> list[int]:
        failures, self.failures = self.failures, []
        self.inbox += self.last_messages if failures else []
        return failures


class FakeBell:
    """Records the sleeps and rings; the n-th sleep ends with a ring."""

    def __init__(self, rings_at: int = 1):
        self.slept: list[float] = []
        self.rung: list[int] = []
        self._rings_at = rings_at

    def sleep(self, timeout_s: float, descriptors: Sequence[int] = ()) -> bool:
        self.slept.append(timeout_s)
        return len(self.slept) >= self._rings_at

    def ring(self, worker: int) -> None:
        self.rung.append(worker)

    def wake(self) -> None: ...
    def close(self) -> None: ...


class DelayedCopies:
    """Copies of a simulated device arena; while `slow`, the test completes them."""

    def __init__(self, arena):
        self.arena, self.slots = arena, []
        self.slow, self.copying = False, []  # addresses of slots, in order

    def done(self, address):
        return address not in self.copying

    def new_slot(self):
        self.slots.append(np.zeros(self.arena.block_bytes, np.uint8))
        return self.slots[-1].ctypes.data

    def _slot(self, address):
        return next(slot for slot in self.slots if slot.ctypes.data == address)

    def to_host(self, block_id, address):
        assert self.done(address)
        self._slot(address)[:] = self.arena.blocks[block_id]
        self.copying += [address] * self.slow

    def to_device(self, block_id, address):
        assert self.done(address)
        self.arena.blocks[block_id] = self._slot(address)
        self.copying += [address] * self.slow
