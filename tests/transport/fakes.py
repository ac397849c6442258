"""A channel without MPI: messages lie in queues until the test lets them be matched."""

import ctypes
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from mellmpi.transport.blocks import LinkError


@dataclass
class FakeRequest:
    kind: str  # "send", "receive" or "discard"
    peer: int
    tag: int
    address: int = 0
    num_bytes: int = 0
    done: bool = False
    cancelled: bool = False
    used_up: bool = False


@dataclass
class FakeChannel:
    """One side's view. A block is matched when the test, or `deliver`, says so."""

    requests: list[FakeRequest] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    waiting: dict[tuple[int, int], deque[bytes]] = field(default_factory=lambda: defaultdict(deque))
    too_long: list[FakeRequest] = field(default_factory=list)
    inbox: deque[tuple[int, bytes]] = field(default_factory=deque)
    last_words: list[tuple[int, bytes]] = field(default_factory=list)  # come with the failures
    failures: list[int] = field(default_factory=list)
    error: Exception | None = None
    num_looks: int = 0
    stuck: bool = False  # messages do not leave

    def _post(self, *args: Any) -> FakeRequest:
        request = FakeRequest(*args)
        if request.peer in self.lost:
            raise LinkError("lost")
        self.requests.append(request)
        return request

    def send(self, address: int, num_bytes: int, dst: int, tag: int) -> FakeRequest:
        return self._post("send", dst, tag, address, num_bytes)

    def receive(self, address: int, num_bytes: int, src: int, tag: int) -> FakeRequest:
        return self._post("receive", src, tag, address, num_bytes)

    def discard(self, src: int, tag: int) -> FakeRequest | None:
        if not self.waiting[src, tag]:
            return None
        request = self._post("discard", src, tag)
        request.num_bytes = len(self.waiting[src, tag].popleft())
        request.done = True
        return request

    def test(self, request: FakeRequest) -> int | None:
        assert not request.used_up, "tested after it was done"
        if request.kind == "receive" and not request.cancelled:
            self._match(request)
        if not (request.done or request.cancelled or request.peer in self.lost):
            return None
        request.used_up = True
        if request in self.too_long:
            raise LinkError("truncated")
        if not request.done and not request.cancelled:
            raise LinkError("lost")
        return 0 if request.cancelled else request.num_bytes

    def _match(self, request: FakeRequest) -> None:
        ahead = [
            r
            for r in self.requests
            if (r.kind, r.peer, r.tag) == ("receive", request.peer, request.tag) and not r.done
        ]
        if self.waiting[request.peer, request.tag] and ahead[:1] == [request]:
            data = self.waiting[request.peer, request.tag].popleft()
            ctypes.memmove(request.address, data, len(data))
            request.done = True

    def cancel(self, request: FakeRequest) -> None:
        request.cancelled = True

    def pending(self, kind: str) -> list[FakeRequest]:
        return [r for r in self.requests if r.kind == kind and not r.used_up]

    def send_bytes(self, data: bytes, dst: int) -> FakeRequest:
        request = self._post("send", dst, 0, 0, len(data))
        request.done = not self.stuck
        return request

    def take(self) -> tuple[int, bytearray, FakeRequest] | None:
        self.num_looks += 1
        if not self.inbox:
            return None
        src, data = self.inbox.popleft()
        return src, bytearray(data), FakeRequest("receive", src, 0, 0, len(data), done=True)

    def newly_failed(self) -> list[int]:
        failures, self.failures = self.failures, []
        self.inbox += self.last_words if failures else []
        return failures


class FakeBell:
    """Records how long it was to sleep, and rings at the n-th time."""

    def __init__(self, rings_at: int = 1):
        self.slept: list[float] = []
        self.rung: list[int] = []
        self._rings_at = rings_at

    def sleep(self, timeout_s: float) -> bool:
        self.slept.append(timeout_s)
        return len(self.slept) >= self._rings_at

    def ring(self, worker: int) -> None:
        self.rung.append(worker)

    def wake(self) -> None: ...
    def close(self) -> None: ...
