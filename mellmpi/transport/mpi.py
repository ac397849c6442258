"""Workers as MPI ranks. The only module that imports MPI, and the only one that knows ranks."""

import contextlib
import ctypes
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import mpi4py
import msgpack

mpi4py.rc.thread_level = "serialized"  # one thread at a time calls MPI: no locks inside it

from mpi4py import MPI  # noqa: E402

from mellmpi.protocol import FINGERPRINT, WorkerLost  # noqa: E402
from mellmpi.transport.base import Arena, Transfer  # noqa: E402
from mellmpi.transport.blocks import BlockMover, InPlace, LinkError  # noqa: E402
from mellmpi.transport.doorbell import Doorbell  # noqa: E402
from mellmpi.transport.messages import Mailbox  # noqa: E402

SPIN_S = 200e-6  # look this long before sleeping, while something is going on
LOCAL_POLL_S = 0.020  # longest sleep where every peer can ring: only failures come unannounced
BUSY_POLL_S = 0.001  # longest sleep while messages are under way that may need our progress
SUSPICION_S = 10.0  # an error on a link that nobody explains by then is a bug, and is raised


FLUSH_S = 5.0  # a closing transport waits that long for its messages to leave
FINALIZE_S = 10.0  # MPI may take that long to shut down after a loss
OPEN_MPI_FT = 12  # MPI_FT in Open MPI's mpi.h; mpi4py has no name for it


def worker_of(rank: int) -> int:
    return rank


def rank_of(worker: int) -> int:
    return worker


class MpiChannel:
    """One communicator of our own: bytes in memory, non-blocking, errors as LinkError."""

    def __init__(self, comm: MPI.Intracomm, suspect: Callable[[MPI.Exception], None]):
        self._comm = comm.Dup()
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._suspect = suspect
        self._group = self._comm.Get_group()
        self._num_failed = 0
        self._status = MPI.Status()
        self._tags = (comm.Get_attr(MPI.TAG_UB) or 32767) + 1

    def send(self, address: int, num_bytes: int, dst: int, tag: int) -> MPI.Request:
        buffer = MPI.buffer.fromaddress(address, num_bytes)
        return self._try(self._comm.Isend, [buffer, MPI.BYTE], rank_of(dst), tag % self._tags)

    def receive(self, address: int, num_bytes: int, src: int, tag: int) -> MPI.Request:
        buffer = MPI.buffer.fromaddress(address, num_bytes)
        return self._try(self._comm.Irecv, [buffer, MPI.BYTE], rank_of(src), tag % self._tags)

    def send_bytes(self, data: bytes, dst: int) -> MPI.Request:
        return self._try(self._comm.Isend, [data, MPI.BYTE], rank_of(dst), 0)

    def take(self) -> tuple[int, bytearray, MPI.Request] | None:
        """Begin to receive the next message from anyone: (source, its bytes to be, request)."""
        message = self._try(self._comm.Improbe, MPI.ANY_SOURCE, MPI.ANY_TAG, self._status)
        if message is None:
            return None
        src, data = worker_of(self._status.source), bytearray(self._status.Get_count(MPI.BYTE))
        return src, data, self._try(message.Irecv, [data, MPI.BYTE])

    def discard(self, src: int, tag: int) -> MPI.Request | None:
        arguments = rank_of(src), tag % self._tags, self._status
        if (message := self._try(self._comm.Improbe, *arguments)) is None:
            return None
        scratch = bytearray(self._status.Get_count(MPI.BYTE))  # mpi4py keeps it with the request
        return self._try(message.Irecv, [scratch, MPI.BYTE])

    def test(self, request: MPI.Request) -> int | None:
        if not self._try(request.Test, self._status):
            return None
        return 0 if self._status.Is_cancelled() else self._status.Get_count(MPI.BYTE)

    def cancel(self, request: MPI.Request) -> None:
        with contextlib.suppress(MPI.Exception):  # it has failed by itself: `test` tells
            request.Cancel()

    def newly_failed(self) -> list[int]:
        """Workers that MPI has found dead since the last call. It looks only while probing."""
        failed = self._comm.Get_failed()
        new = []
        if failed.size > self._num_failed:
            ranks = failed.Translate_ranks(None, self._group)
            new, self._num_failed = ranks[self._num_failed :], failed.size
            self._comm.Ack_failed(failed.size)  # lets ANY_SOURCE go on between the living
        failed.Free()
        return [worker_of(rank) for rank in new]

    def _try(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except MPI.Exception as error:
            if error.Get_error_class() != MPI.ERR_TRUNCATE:
                self._suspect(error)
            raise LinkError(str(error)) from error


@dataclass(frozen=True)
class Wakes:
    """How a rank waits."""

    longest_s: float  # sleep between looks
    spin_s: float  # look for so long before sleeping, while something is going on


class MpiTransport:
    """The Transport of one rank. Made by all ranks together, after MPI was started."""

    def __init__(self, comm: MPI.Intracomm, bell: Doorbell, wakes: Wakes):
        self.worker = worker_of(comm.rank)
        self.num_workers = comm.size - 1
        self._control = MpiChannel(comm, self._suspect)
        self._mailbox = Mailbox(self._control)
        self._mover = BlockMover(MpiChannel(comm, self._suspect))
        self._bell = bell
        self._wakes = wakes
        self._active = True  # something happened since the last sleep
        self._ready: list[tuple[int, Any]] = []
        self._lost: set[int] = set()
        self._suspicion: tuple[float, MPI.Exception] | None = None  # (since when, the first error)

    def send(self, dst: int, message: Any) -> None:
        self._mailbox.send(dst, message)
        self._active = True
        self._bell.ring(rank_of(dst))

    def poll(self) -> list[tuple[int, Any]]:
        self._look()
        ready, self._ready = self._ready, []
        return ready

    def _look(self) -> bool:
        """Take in what has come; True if there is anything for poll()."""
        if came := self._mailbox.look():
            self._ready += came
            self._active = True
        self._check_failures()
        return bool(self._ready)

    def _suspect(self, error: MPI.Exception) -> None:
        if not self._lost and self._suspicion is None:
            self._suspicion = (time.monotonic(), error)

    def _check_failures(self) -> None:
        for worker in self._control.newly_failed():
            self._suspicion = None
            self._lost.add(worker)
            self._ready += [*self._mailbox.forget(worker), (worker, WorkerLost(worker))]
            self._mover.forget(worker)
        if self._suspicion and time.monotonic() - self._suspicion[0] > SUSPICION_S:
            raise self._suspicion[1]

    def attach(self, arena: Arena | None) -> None:
        self._mover.attach(None if arena is None else InPlace(arena))

    def send_blocks(self, dst: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        transfer = self._mover.send(dst, tag, block_ids)
        self._bell.ring(rank_of(dst))
        return transfer

    def receive_blocks(self, src: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        return self._mover.receive(src, tag, block_ids)

    def drain_blocks(self, src: int, tag: int, num_blocks: int) -> Transfer:
        return self._mover.drain(src, tag, num_blocks)

    def progress(self) -> bool:
        peers = self._mover.progress()
        for peer in peers:
            self._bell.ring(rank_of(peer))
        self._active |= bool(peers)
        return bool(peers)

    def wait(self, timeout_s: float) -> None:
        now = time.perf_counter()
        deadline_s, spin_until_s = (
            now + timeout_s,
            now + (self._wakes.spin_s if self._active else 0.0),
        )
        doze_s = 100e-6
        while not self._look() and not self.progress():
            if (now := time.perf_counter()) >= deadline_s:
                return
            if now < spin_until_s:
                os.sched_yield()
                continue
            self._active = False
            if self._bell.sleep(
                min(deadline_s - now, self._wakes.longest_s, doze_s if self._busy else 1e9)
            ):
                self._look()
                self.progress()
                return
            doze_s = min(BUSY_POLL_S, 2 * doze_s)

    @property
    def _busy(self) -> bool:
        return bool(self._mover.busy or self._mailbox.busy)

    def wake(self) -> None:
        self._bell.wake()

    @property
    def lost(self) -> bool:
        """Some worker was lost."""
        return bool(self._lost)

    def close(self) -> None:
        deadline_s = time.monotonic() + FLUSH_S
        while self._mailbox.leaving and time.monotonic() < deadline_s:
            self.wait(0.01)
        self._mover.close()
        self._bell.close()


class MixedInstallation(Exception):
    """Ranks run different versions of mellmpi."""


class Job:
    """This process's place in the MPI job: the start together, and the end.

    All methods but `abort` and `vanish` are collective: every rank calls them, in the same order.
    """

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size
        names = self.gather(MPI.Get_processor_name().encode().ljust(MPI.MAX_PROCESSOR_NAME))
        self.hosts = [name.decode().strip() for name in names]  # of every rank
        self._transport: MpiTransport | None = None

    @property
    def neighbours(self) -> list[int]:
        """The ranks of this host, this one included; its index here is its node-local rank."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]

    def check_installation(self, fingerprint: str = FINGERPRINT) -> None:
        """Raises MixedInstallation, on all ranks alike, unless all speak the same protocol."""
        seen = self.gather(fingerprint.encode())
        if odd := [rank for rank, one in enumerate(seen) if one != seen[0]]:
            raise MixedInstallation(
                f"ranks {odd} (hosts: {', '.join(sorted({self.hosts[r] for r in odd}))}) run "
                f"another version of mellmpi than rank 0 ({self.hosts[0]}); install the same "
                "version on every host"
            )

    def share(self, data: Any) -> Any:
        """Rank 0's plain data, on every rank (the others pass None)."""
        packed = msgpack.packb(data)
        size = int.from_bytes(self._bcast(len(packed).to_bytes(8, "little")), "little")
        return msgpack.unpackb(self._bcast(packed.ljust(size)[:size]))

    def connect(self, idle_poll_s: float) -> MpiTransport:
        """The transport of this rank; one a process."""
        bell = Doorbell(self.share(secrets.token_hex(8)), self.rank)
        self._comm.Barrier()  # every bell is hung up
        heard = bell.find(self.neighbours)
        rows = self.gather(bytes(rank in heard for rank in range(self.size)))
        all_ring = all(row[self.rank] for row in rows)
        may_spin = len(self.neighbours) <= len(os.sched_getaffinity(0))
        wakes = Wakes(LOCAL_POLL_S if all_ring else idle_poll_s, SPIN_S if may_spin else 0.0)
        self._transport = MpiTransport(self._comm, bell, wakes)
        return self._transport

    def finish(self, exit_code: int = 0) -> None:
        """Shut MPI down together. After a loss it may end the process, with this code."""
        limit = threading.Timer(FINALIZE_S, os._exit, [exit_code])
        limit.daemon = True
        if self._transport:
            self._transport.close()
            if not self._transport.lost:
                self._meet(self._transport)
            if self._transport.lost:  # MPI_Finalize then hangs now and then
                limit.start()
        MPI.Finalize()
        limit.cancel()

    def _meet(self, transport: MpiTransport) -> None:
        """Sleep until all ranks are here: inside MPI_Finalize they would spin."""
        try:
            request = self._comm.Ibarrier()
            while not transport.lost and not request.Test():
                transport.poll()
                time.sleep(0.002)
        except MPI.Exception:
            transport.poll()

    def abort(self, exit_code: int) -> NoReturn:
        """End the whole job at once; `exit_code` must not be 0."""
        assert exit_code != 0, "the launcher would let the others run on"
        sys.stdout.flush()
        sys.stderr.flush()
        if not self.survivable:
            self._comm.Abort(exit_code)
        # Under ULFM an MPI_Abort ends this rank alone (seen), but a bad exit code ends the job.
        os._exit(exit_code)

    def vanish(self) -> NoReturn:
        """End this process alone, at once: the others find its worker lost."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)  # an exit code would end the job
        raise AssertionError("still alive")

    @property
    def survivable(self) -> bool:
        """MPI lets the job outlive a lost rank: `mpirun --with-ft ulfm`."""
        if MPI.get_vendor()[0] != "Open MPI":
            return False
        address = self._comm.Get_attr(OPEN_MPI_FT)
        return bool(address) and ctypes.c_int.from_address(address).value != 0

    def gather(self, data: bytes) -> list[bytes]:
        """Data of the same length from every rank, by rank."""
        whole = bytearray(len(data) * self.size)
        self._comm.Allgather([data, MPI.BYTE], [whole, MPI.BYTE])
        return [bytes(whole[i : i + len(data)]) for i in range(0, len(whole), len(data))]

    def _bcast(self, data: bytes) -> bytearray:
        buffer = bytearray(data)
        self._comm.Bcast([buffer, MPI.BYTE], 0)
        return buffer
