"""Wakes a sleeping worker of the same host: a datagram to its socket after each message to it.

MPI itself can only spin or be polled. A bell carries nothing: whoever is woken looks at MPI.
"""

import select
import socket
from collections.abc import Iterable


def _name(token: str, worker: int) -> bytes:
    return f"\0mellmpi-{token}-{worker}".encode()  # abstract: nothing to clean up after a crash


class Doorbell:
    """One worker's bell. `token` is the job's own, so that two jobs of a host never meet."""

    def __init__(self, token: str, worker: int):
        self._token = token
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(_name(token, worker))
        self._own = _name(token, worker)
        self._names: dict[int, bytes] = {}  # of the workers that hear us

    def find(self, workers: Iterable[int]) -> set[int]:
        """Of these workers, those whose bell can be rung from here; only they will be."""
        for worker in workers:
            name = _name(self._token, worker)
            if self._ring(name):
                self._names[worker] = name
        return set(self._names)

    def ring(self, worker: int) -> None:
        """Wake that worker, if it can be; never blocks, never fails."""
        if (name := self._names.get(worker)) is not None:
            self._ring(name)

    def wake(self) -> None:
        """Wake the owner, from any of its threads."""
        self._ring(self._own)

    def _ring(self, name: bytes) -> bool:
        try:
            self._socket.sendto(b"!", name)
        except BlockingIOError:
            return True  # its queue is full of bells: it will wake
        except OSError:
            return False  # gone, or in another network namespace
        return True

    def sleep(self, timeout_s: float) -> bool:
        """Until the bell rings or the time is over; True if it rang. Many rings are one."""
        if not select.select([self._socket], [], [], max(0.0, timeout_s))[0]:
            return False
        while True:
            try:
                self._socket.recv(16)
            except BlockingIOError:
                return True

    def close(self) -> None:
        self._socket.close()
