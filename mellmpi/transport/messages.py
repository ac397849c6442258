"""Sends and receives protocol messages over a channel of non-blocking messages."""

from collections import defaultdict, deque
from typing import Any

from mellmpi.protocol import decode, encode
from mellmpi.transport.channel import ByteChannel, LinkError


class Dismissed(Exception):
    """A rank ends the job, with this exit code; or confirms that it has been told."""

    def __init__(self, source: int, exit_code: int):
        super().__init__(f"dismissed by rank {source} with exit code {exit_code}")
        self.source, self.exit_code = source, exit_code


class Mailbox:
    """Messages on their way in and out, in order on each link."""

    def __init__(self, channel: ByteChannel):
        self._channel = channel
        self._lost: set[int] = set()
        self._arriving: dict[int, deque[tuple[bytearray, Any]]] = defaultdict(deque)
        self._leaving: dict[int, deque[tuple[bytes, Any]]] = defaultdict(deque)

    @property
    def busy(self) -> bool:
        """Something is under way that may need our progress."""
        return bool(self._leaving or self._arriving)

    @property
    def leaving(self) -> bool:
        return bool(self._leaving)

    def send(self, dst: int, message: Any) -> None:
        if dst in self._lost:
            return
        self._send(dst, encode(message))

    def dismiss(self, dst: int, exit_code: int) -> None:
        """Raise Dismissed there: one byte, which no message is."""
        if dst not in self._lost:
            self._send(dst, bytes([exit_code]))

    def _send(self, dst: int, data: bytes) -> None:
        try:  # the bytes are kept until they have left
            self._leaving[dst].append((data, self._channel.send_bytes(data, dst)))
        except LinkError:
            return

    def look(self) -> list[tuple[int, Any]]:
        """All that has come, as (source, message); lets go of what has left."""
        self._take_all()
        if self._leaving:
            self._reap()
        return self._deliver() if self._arriving else []

    def _take_all(self) -> None:
        # Open MPI seems to make progress only in a probe that matches nothing: hence two misses.
        misses = 0
        while misses < 2:
            try:
                taken = self._channel.take()
            except LinkError:
                return
            if taken is None:
                misses += 1
                continue
            src, data, request = taken
            self._arriving[src].append((data, request))
            misses = 0

    def _deliver(self) -> list[tuple[int, Any]]:
        came = []
        for src in list(self._arriving):
            queue = self._arriving[src]
            try:
                while queue and self._channel.test(queue[0][1]):
                    data, _ = queue.popleft()
                    if len(data) == 1:
                        raise Dismissed(src, data[0])
                    came.append((src, decode(bytes(data))))
            except LinkError:
                queue.clear()  # cut off in the middle of a message: nothing more will come
            if not queue:
                del self._arriving[src]
        return came if not self._lost else [(s, m) for s, m in came if s not in self._lost]

    def _reap(self) -> None:
        for dst in list(self._leaving):
            queue = self._leaving[dst]
            try:
                while queue and self._channel.test(queue[0][1]):
                    queue.popleft()
            except LinkError:
                queue.popleft()
            if not queue:
                del self._leaving[dst]

    def forget(self, worker: int) -> list[tuple[int, Any]]:
        """The worker is lost: what it still got out. Nothing from it is delivered afterwards."""
        came = self.look()
        self._lost.add(worker)
        return came
