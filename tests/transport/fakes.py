"""A channel without MPI: messages lie in queues until the test lets them be matched."""

import ctypes
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from mellmpi.transport.channel import LinkError


@dataclass
class FakeRequest:
    kind: str  # "send" or "receive"
    peer: int
    tag: int
    address: int = 0
    num_bytes: int = 0
    done: bool = False
    came: int | None = None  # bytes that a receive was filled with
    used_up: bool = False


@dataclass
class FakeChannel:
    """One side's view. What a message holds, and when one has left, is the test's to say."""

    num_tags = 1 << 15  # as few as MPI promises

    requests: list[FakeRequest] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    waiting: dict[tuple[int, int], deque[bytes]] = field(default_factory=lambda: defaultdict(deque))
    eager: int = 0  # bytes: shorter messages and those leave by themselves
    slow: bool = False  # what is being received is not done by itself
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
        """What has come goes to the oldest receive of its tag."""
        for request in self.requests:
            data = self.waiting[request.peer, request.tag]
            if request.kind == "receive" and request.came is None and not request.done and data:
                self._fill(request, data.popleft())

    def _fill(self, request: FakeRequest, data: bytes) -> None:
        assert len(data) <= request.num_bytes, "Open MPI would write on behind the buffer"
        ctypes.memmove(request.address, data, len(data))
        request.came, request.done = len(data), not self.slow

    def finished(self, request: FakeRequest) -> int | None:
        self._deliver()
        return (request.came or 0) if self.test(request) else None

    def cancel(self, request: FakeRequest) -> None:
        request.done = request.done or request.came is None

    def test(self, request: FakeRequest) -> bool:
        assert not request.used_up, "tested after it was done"
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
