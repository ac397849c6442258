"""Wakes a sleeping worker of the same host: a datagram to its Unix socket after each message.

MPI can only be polled. The datagram carries no data: a woken worker polls MPI.
"""

import select
import socket
from collections.abc import Iterable, Sequence


def _socket_name(token: str, worker: int) -> bytes:
    """In the abstract namespace (unix(7)): nothing to clean up after a crash."""
    return f"\0mellmpi-{token}-{worker}".encode()


class Doorbell:
    """The doorbell of one worker. `token` is unique to the job, so that jobs do not interfere."""

    def __init__(self, token: str, worker: int):
        self._token = token
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._own_name = _socket_name(token, worker)
        self._socket.bind(self._own_name)
        self._names: dict[int, bytes] = {}  # of reachable workers

    def find(self, workers: Iterable[int]) -> set[int]:
        """Return those workers that can be woken from here; `ring` ignores all others."""
        for worker in workers:
            name = _socket_name(self._token, worker)
            if self._notify(name):
                self._names[worker] = name
        return set(self._names)

    def ring(self, worker: int) -> None:
        """Wake that worker if it is reachable; never blocks, never fails."""
        if (name := self._names.get(worker)) is not None:
            self._notify(name)

    def wake(self) -> None:
        """Wake the owner, from any of its threads."""
        self._notify(self._own_name)

    def _notify(self, name: bytes) -> bool:
        """Send a datagram to this socket; False if it does not exist."""
        try:
            self._socket.sendto(b"!", name)
        except BlockingIOError:
            return True  # its queue is full: it will wake up anyway
        except OSError:
            return False  # closed, or in another network namespace
        return True

    def sleep(self, timeout_s: float, descriptors: Sequence[int] = ()) -> bool:
        """Sleep until the doorbell rings or a descriptor is readable (True), or `timeout_s` has
        passed. Clears all rings."""
        sources: list[socket.socket | int] = [self._socket, *descriptors]
        if not select.select(sources, [], [], max(0.0, timeout_s))[0]:
            return False
        while True:
            try:
                self._socket.recv(16)
            except BlockingIOError:
                return True

    def close(self) -> None:
        self._socket.close()
