"""Messages over one MPI communicator."""

import threading
import time
from collections.abc import Callable
from typing import Any

from mellmpi.transport.channel import LinkError
from mellmpi.transport.mpi.library import MPI

LOOKS = 3  # at what is not done: each carries TCP on a bit, and costs less than what is around it
SURELY_HERE_BYTES = 1024  # a message so small is sent whole, not announced first


def worker_of(rank: int) -> int:
    return rank


rank_of = worker_of


class MpiLock:
    """Whose turn it is to call MPI, for two threads. Messages never wait for more than one call.

    MPI could look after itself (MPI_THREAD_MULTIPLE), but calls are short, and what it does when a
    worker dies is little tried with several threads in it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = False  # by the main thread, that waits
        self.leave = self._lock.release

    def take(self) -> None:
        """For messages, in the main thread."""
        if not self._lock.acquire(blocking=False):
            self._wanted = True
            self._lock.acquire()
            self._wanted = False

    def take_patiently(self) -> None:
        """For blocks. A lock alone would go to the thread that has just left it."""
        while self._wanted:
            time.sleep(0)
        self._lock.acquire()


class MpiChannel:
    """One communicator of our own: bytes in memory, non-blocking, errors as LinkError.

    Nothing is sent to a rank that MPI knows to be dead: Open MPI 5.0.11 checks that in no call that
    sends, and crashes where the last route to that rank is gone.
    """

    error: Exception | None = None  # the first one

    def __init__(self, comm: MPI.Intracomm, take: Callable[[], None], leave: Callable[[], None]):
        self._take, self._leave = take, leave  # around every call: see `MpiLock`
        self._comm = comm.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._group = self._comm.Get_group()
        self._failed: set[int] = set()  # ranks
        self._untold: list[int] = []  # of them, those that `newly_failed` has not returned yet
        self._status = MPI.Status()
        self.num_tags = (comm.Get_attr(MPI.TAG_UB) or 32767) + 1

    def send(self, address: int, num_bytes: int, dst: int, tag: int) -> Any:
        return self._try(self._send, MPI.buffer.fromaddress(address, num_bytes), rank_of(dst), tag)

    def receive(self, address: int, num_bytes: int, src: int, tag: int) -> Any:
        buffer = MPI.buffer.fromaddress(address, num_bytes)
        return self._try(self._comm.Irecv, buffer, rank_of(src), tag)

    def match(self, src: int, tag: int) -> tuple[MPI.Message, int] | None:
        message = self._try(self._comm.Improbe, rank_of(src), tag, self._status)
        return None if message is None else (message, self._status.Get_count(MPI.BYTE))

    def receive_matched(self, message: MPI.Message, src: int, address: int, num_bytes: int) -> Any:
        buffer = MPI.buffer.fromaddress(address, num_bytes)
        return self._try(self._receive_matched, message, rank_of(src), buffer)

    def finished(self, request: MPI.Request) -> int | None:
        for _ in range(LOOKS):
            if self._try(request.Test, self._status):
                return self._status.Get_count(MPI.BYTE)
        return None

    def cancel(self, request: MPI.Request) -> None:
        self._try(request.Cancel)

    def send_bytes(self, data: bytes, dst: int) -> Any:
        return self._try(self._send, data, rank_of(dst), 0)

    def take(self) -> tuple[int, bytearray, MPI.Request] | None:
        """Begin to receive the next message from anyone: (source, its bytes to be, request)."""
        message = self._try(self._comm.Improbe, MPI.ANY_SOURCE, MPI.ANY_TAG, self._status)
        if message is None:
            return None
        rank, data = self._status.source, bytearray(self._status.Get_count(MPI.BYTE))
        return worker_of(rank), data, self._try(self._receive_matched, message, rank, data)

    def test(self, request: MPI.Request) -> bool:
        return bool(self._try(request.Test))

    def newly_failed(self) -> list[int]:
        """Workers that MPI has found dead since the last call. It looks only while probing."""
        self._try(self._look_for_failures)
        untold, self._untold = self._untold, []
        return [worker_of(rank) for rank in untold]

    # --- within one turn -------------------------------------------------------------------------

    def _send(self, buffer: Any, rank: int, tag: int) -> MPI.Request:
        self._check_living(rank)
        return self._comm.Isend(buffer, rank, tag)

    def _receive_matched(self, message: MPI.Message, rank: int, buffer: Any) -> MPI.Request:
        if len(buffer) > SURELY_HERE_BYTES:  # else it may have to be asked for
            self._check_living(rank)
        return message.Irecv(buffer)

    def _check_living(self, rank: int) -> None:
        self._look_for_failures()
        if rank in self._failed:
            raise LinkError(f"rank {rank} is lost")

    def _look_for_failures(self) -> None:
        failed = self._comm.Get_failed()
        if failed.size > len(self._failed):
            new = sorted(set(failed.Translate_ranks(None, self._group)) - self._failed)
            self._failed.update(new)
            self._untold.extend(new)
            self._comm.Ack_failed(failed.size)  # lets ANY_SOURCE go on between the living
        failed.Free()

    def _try(self, call: Callable[..., Any], *args: Any) -> Any:
        self._take()
        try:
            return call(*args)
        except MPI.Exception as error:
            self.error = self.error or error
            raise LinkError(str(error)) from error
        finally:
            self._leave()
