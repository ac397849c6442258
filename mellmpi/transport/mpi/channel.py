"""Messages over one MPI communicator."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from mellmpi.transport.channel import LinkError
from mellmpi.transport.mpi.library import MPI

TESTS = 3  # of an incomplete request: each advances TCP and is cheap beside the rest of a poll
EAGER_BYTES = 1024  # messages up to this size are sent eagerly, without a rendezvous

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def worker_of(rank: int) -> int:
    return rank


rank_of = worker_of


class MpiLock:
    """Serializes the MPI calls of two threads. The main thread waits for one call at most.

    MPI_THREAD_MULTIPLE would do without, but calls are short, and the handling of dead workers is
    hardly tested with several threads inside MPI.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = False  # the main thread waits for the lock
        self.release = self._lock.release

    def acquire(self) -> None:
        """For messages, in the main thread."""
        if not self._lock.acquire(blocking=False):
            self._wanted = True
            self._lock.acquire()
            self._wanted = False

    def acquire_after_messages(self) -> None:
        """For blocks. Gives way to the main thread: a plain lock is unfair, and the thread that has
        just released it would get it again."""
        while self._wanted:
            time.sleep(0)
        self._lock.acquire()


class MpiChannel:
    """A duplicate of a communicator as a `PeerChannel`.

    Nothing is sent to a rank that MPI knows to be dead: Open MPI 5.0.11 does not check that in its
    send calls, and crashes if it has no route to that rank any more.

    acquire, release  called before and after every MPI call, see `MpiLock`
    """

    error: Exception | None = None  # the first one

    def __init__(
        self, comm: MPI.Intracomm, acquire: Callable[[], object], release: Callable[[], object]
    ):
        self._acquire, self._release = acquire, release
        self._comm = comm.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._group = self._comm.Get_group()
        self._failed: set[int] = set()  # ranks
        self._new_failures: list[int] = []  # failed ranks that `newly_failed` has not returned yet
        self._status = MPI.Status()
        self.num_tags = (comm.Get_attr(MPI.TAG_UB) or 32767) + 1

    def send(self, address: int, num_bytes: int, dst: int, tag: int) -> MPI.Request:
        return self._try(self._send, MPI.buffer.fromaddress(address, num_bytes), rank_of(dst), tag)

    def receive(self, address: int, num_bytes: int, src: int, tag: int) -> MPI.Request:
        buffer = MPI.buffer.fromaddress(address, num_bytes)
        return self._try(self._comm.Irecv, buffer, rank_of(src), tag)

    def match(self, src: int, tag: int) -> tuple[MPI.Message, int] | None:
        message = self._try(self._comm.Improbe, rank_of(src), tag, self._status)
        return None if message is None else (message, self._status.Get_count(MPI.BYTE))

    def receive_matched(
        self, message: MPI.Message, src: int, address: int, num_bytes: int
    ) -> MPI.Request:
        buffer = MPI.buffer.fromaddress(address, num_bytes)
        return self._try(self._receive_matched, message, rank_of(src), buffer)

    def finished(self, request: MPI.Request) -> int | None:
        for _ in range(TESTS):
            if self._try(request.Test, self._status):
                return self._status.Get_count(MPI.BYTE)
        return None

    def cancel(self, request: MPI.Request) -> None:
        self._try(request.Cancel)

    def send_bytes(self, data: bytes, dst: int) -> MPI.Request:
        return self._try(self._send, data, rank_of(dst), 0)

    def take(self) -> tuple[int, bytearray, MPI.Request] | None:
        message = self._try(self._comm.Improbe, MPI.ANY_SOURCE, MPI.ANY_TAG, self._status)
        if message is None:
            return None
        rank, data = self._status.source, bytearray(self._status.Get_count(MPI.BYTE))
        return worker_of(rank), data, self._try(self._receive_matched, message, rank, data)

    def test(self, request: MPI.Request) -> bool:
        return self._try(request.Test)

    def newly_failed(self) -> list[int]:
        """Returns workers found dead since the last call. MPI detects them in probes only."""
        self._try(self._update_failed)
        new, self._new_failures = self._new_failures, []
        return [worker_of(rank) for rank in new]

    # --- with the lock ---------------------------------------------------------------------------

    def _send(self, buffer: MPI.buffer | bytes, rank: int, tag: int) -> MPI.Request:
        self._check_alive(rank)
        return self._comm.Isend(buffer, rank, tag)

    def _receive_matched(
        self, message: MPI.Message, rank: int, buffer: MPI.buffer | bytearray
    ) -> MPI.Request:
        if len(buffer) > EAGER_BYTES:  # a rendezvous sends a request to the rank
            self._check_alive(rank)
        return message.Irecv(buffer)

    def _check_alive(self, rank: int) -> None:
        self._update_failed()
        if rank in self._failed:
            raise LinkError(f"rank {rank} is lost")

    def _update_failed(self) -> None:
        failed = self._comm.Get_failed()
        if failed.size > len(self._failed):
            new = sorted(set(failed.Translate_ranks(None, self._group)) - self._failed)
            self._failed.update(new)
            self._new_failures.extend(new)
            self._comm.Ack_failed(failed.size)  # re-enables ANY_SOURCE among the other ranks
        failed.Free()

    def _try(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Make an MPI call with the lock. Raises LinkError."""
        self._acquire()
        try:
            return call(*args)
        except MPI.Exception as error:
            self.error = self.error or error
            raise LinkError(str(error)) from error
        finally:
            self._release()
