"""Sends and receives protocol messages over a channel of non-blocking messages."""

from collections import defaultdict, deque
from typing import Any

from mellmpi.protocol import decode, encode
from mellmpi.transport.channel import ByteChannel, LinkError, Request


class Terminated(Exception):
    """A rank terminates the job with this exit code, or confirms that it has been terminated."""

    def __init__(self, source: int, exit_code: int):
        super().__init__(f"terminated by rank {source} with exit code {exit_code}")
        self.source, self.exit_code = source, exit_code


class Mailbox:
    """Outgoing and incoming messages of one rank, in order on each link."""

    def __init__(self, channel: ByteChannel):
        self._channel = channel
        self._lost: set[int] = set()
        self._incoming: dict[int, deque[tuple[bytearray, Request]]] = defaultdict(deque)
        self._outgoing: dict[int, deque[tuple[bytes, Request]]] = defaultdict(deque)

    @property
    def busy(self) -> bool:
        """Messages are in flight that may need our progress."""
        return bool(self._outgoing or self._incoming)

    @property
    def sending(self) -> bool:
        return bool(self._outgoing)

    def send(self, dst: int, message: Any) -> None:
        if dst in self._lost:
            return
        self._send(dst, encode(message))

    def terminate(self, dst: int, exit_code: int) -> None:
        """Make `receive` raise Terminated there: one byte, shorter than any encoded message."""
        if dst not in self._lost:
            self._send(dst, bytes([exit_code]))

    def _send(self, dst: int, data: bytes) -> None:
        try:  # keep a reference to the bytes until they have been sent
            self._outgoing[dst].append((data, self._channel.send_bytes(data, dst)))
        except LinkError:
            return

    def receive(self) -> list[tuple[int, Any]]:
        """Return all messages that have arrived as (source, message); release sent buffers."""
        self._start_receives()
        if self._outgoing:
            self._release_sent()
        return self._completed() if self._incoming else []

    def _start_receives(self) -> None:
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
            self._incoming[src].append((data, request))
            misses = 0

    def _completed(self) -> list[tuple[int, Any]]:
        received = []
        for src in list(self._incoming):
            queue = self._incoming[src]
            try:
                while queue and self._channel.test(queue[0][1]):
                    data, _ = queue.popleft()
                    if len(data) == 1:
                        raise Terminated(src, data[0])
                    received.append((src, decode(bytes(data))))
            except LinkError:
                queue.clear()  # the source died within a message: no more will arrive
            if not queue:
                del self._incoming[src]
        return [(s, m) for s, m in received if s not in self._lost] if self._lost else received

    def _release_sent(self) -> None:
        for dst in list(self._outgoing):
            queue = self._outgoing[dst]
            try:
                while queue and self._channel.test(queue[0][1]):
                    queue.popleft()
            except LinkError:
                queue.popleft()
            if not queue:
                del self._outgoing[dst]

    def drop_peer(self, worker: int) -> list[tuple[int, Any]]:
        """The worker is lost: return what has arrived, then ignore all its later messages."""
        received = self.receive()
        self._lost.add(worker)
        return received
