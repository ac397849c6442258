"""Workers as MPI ranks: how MPI starts, what all ranks do together, how a job ends."""

import atexit
import ctypes
import faulthandler
import os
import secrets
import signal
import sys
from typing import Any, NoReturn

from mellmpi.protocol import FINGERPRINT, RankFailed
from mellmpi.transport.blocks import Proof
from mellmpi.transport.doorbell import Doorbell
from mellmpi.transport.endpoint import Endpoint, Wakes
from mellmpi.transport.mpi.channel import MpiChannel, MpiLock, worker_of
from mellmpi.transport.mpi.launcher import end_launcher
from mellmpi.transport.mpi.library import MPI
from mellmpi.transport.mpi.yielding import set_yielding
from mellmpi.transport.post import FAULT, USAGE, PeerFailed, Post

END_LIMIT_S = 5.0  # of MPI_Finalize: a rank that dies at the wrong moment would keep others there
SPIN_S = 200e-6  # look this long before sleeping, while something is going on
LOCAL_POLL_S = 0.020  # longest sleep where every peer can ring: only failures come unannounced
OPEN_MPI_FT = 12  # MPI_FT in Open MPI's mpi.h; mpi4py has no name for it


class MixedInstallation(Exception):
    """Ranks run different versions of mellmpi."""


class MpiJob:
    """This process's place in the MPI job: the start together, and the end.

    All methods but `abort` and `fail` are collective: every rank calls them, in the same order.
    They raise PeerFailed where another rank has died or failed.
    """

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size
        self._lock = MpiLock()
        try:
            channel = MpiChannel(self._comm, self._lock.take, self._lock.leave)
        except MPI.Exception as error:
            raise PeerFailed(FAULT, f"mellmpi: a rank has died at the start ({error})") from error
        self._post = Post(self.rank, self.size, channel)
        names = self.gather(MPI.Get_processor_name().encode())
        self.hosts = [name.decode() for name in names]  # of every rank
        self._transport: Endpoint | None = None
        self._yielding = False  # while MPI waits by itself
        if self.size == 1:
            atexit.register(self.finish)  # nobody to hang with, and mpirun insists on it

    @property
    def neighbours(self) -> list[int]:
        """The ranks of this host, this one included; its index here is its node-local rank."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]

    def check_installation(self, fingerprint: str = FINGERPRINT) -> None:
        """Raises MixedInstallation, on all ranks alike, unless all speak the same protocol."""
        seen = self.gather(fingerprint.encode())
        if odd := [rank for rank, one in enumerate(seen) if one != seen[0]]:
            hosts = ", ".join(sorted({self.hosts[rank] for rank in odd}))
            raise MixedInstallation(
                f"ranks {odd} (on {hosts}) run another version of mellmpi than rank 0 (on "
                f"{self.hosts[0]}); install the same version on every host"
            )

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's data, by rank."""
        return self._post.gather(data)

    def share(self, data: Any) -> Any:
        """Rank 0's plain data, on every rank (the others pass None)."""
        return self._post.share(data)

    def connect(
        self,
        idle_poll_s: float,
        device_buffers: bool = False,
        checksums: str = "auto",
        carried: bool = True,
        reading: bool = True,
    ) -> Endpoint:
        """The transport of this rank; one a process.

        idle_poll_s     longest sleep between looks while some peer cannot ring our bell
        device_buffers  this MPI takes device memory (`devices.device_buffers_work`)
        checksums       of every block: "auto" between hosts, "always" or "never"
        carried         blocks move in a thread of their own, where MPI allows several
        reading         blocks are read out of the memory of others, where the system allows it
        """
        bell = Doorbell(self.share(secrets.token_hex(8)), worker_of(self.rank))
        self.gather(b"")  # every bell is hung up
        heard = bell.find(worker_of(rank) for rank in self.neighbours)
        rows = self.gather(bytes(worker_of(rank) in heard for rank in range(self.size)))
        all_ring = all(row[self.rank] for row in rows)
        may_spin = len(self.neighbours) <= len(os.sched_getaffinity(0))
        longest_s = LOCAL_POLL_S if all_ring else idle_poll_s
        wakes = Wakes(all_ring, longest_s, SPIN_S if may_spin else 0.0)
        blocks = MpiChannel(self._comm, self._lock.take_patiently, self._lock.leave)
        self._transport = Endpoint(
            self._post,
            blocks,
            bell,
            wakes,
            device_buffers,
            self._checked(checksums),
            carried and MPI.Query_thread() >= MPI.THREAD_SERIALIZED,
            self._read_by(reading and not device_buffers),
        )
        self._yielding |= set_yielding(False)  # from here on nobody waits inside MPI
        return self._transport

    def _checked(self, checksums: str) -> frozenset[int]:
        """Workers to and from whom blocks have checksums. Both ends come to the same."""
        # Between two of one host the processor copies: a checksum would cost a third of the
        # bandwidth there, and guards memory that has its own.
        near = set(self.neighbours) if checksums == "auto" else set()
        ranks = range(self.size) if checksums != "never" else ()
        return frozenset(worker_of(rank) for rank in ranks if rank not in near)

    def _read_by(self, reading: bool) -> frozenset[int]:
        """Workers that can read our memory, and shall."""
        proof = Proof()
        proofs = self.gather(proof.packed)
        others = set(self.neighbours) - {self.rank} if reading else set()
        can = bytes(rank in others and Proof.holds(proofs[rank]) for rank in range(self.size))
        rows = self.gather(can)
        return frozenset(worker_of(rank) for rank in others if rows[rank][self.rank])

    def serve(self) -> None:
        """The start is over: from here on the job outlives a worker that fails, where MPI can."""
        self._post.starting = not self.survivable

    def finish(self) -> list[str]:
        """All is done: shut MPI down, together. Returns why workers failed meanwhile, at rank 0."""
        if MPI.Is_finalized():
            return []
        if self._transport:
            self._transport.close()
        try:
            self._post.gather(b"")  # sleeps until all ranks are here: MPI_Finalize would spin
        except PeerFailed:
            if not self._post.lost:
                raise
        failures = [m.text for _, m in self._post.poll() if isinstance(m, RankFailed)]
        if self._post.lost:
            return failures  # MPI_Finalize then hangs in one of five runs (seen); we need it not
        set_yielding(self._yielding)
        faulthandler.dump_traceback_later(END_LIMIT_S, exit=True)
        MPI.Finalize()
        faulthandler.cancel_dump_traceback_later()
        return failures

    def fail(self, exit_code: int, text: str) -> NoReturn:
        """End this rank, which cannot go on, and with it the job, where it cannot either.

        Rank 0 prints the text. While the job serves, the others find this worker lost.
        """
        try:
            self._post.report_failure(exit_code, text)
            if not self._post.starting and exit_code != USAGE:
                self.vanish(exit_code)
            self._post.await_dismissal()
            if 0 not in self._post.lost:
                sys.stderr.write(f"{text}\n")  # rank 0 is busy
        finally:
            self.abort(exit_code)

    def abort(self, exit_code: int) -> NoReturn:
        """End the whole job at once; `exit_code` must not be 0."""
        assert exit_code != 0, "the launcher would let the others run on"
        sys.stdout.flush()
        sys.stderr.flush()
        # Under ULFM mpirun ends nobody (seen with 5.0.11): every rank leaves once it is told.
        try:
            if not self._post.dismiss(exit_code):
                self._end_all(exit_code)
        finally:
            os._exit(exit_code)

    def _end_all(self, exit_code: int) -> None:
        """Have the launcher end ranks that do not listen."""
        if self.survivable:
            end_launcher()
        else:
            self._comm.Abort(exit_code)

    def vanish(self, exit_code: int) -> NoReturn:
        """End this process alone, at once: the others find its worker lost."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.survivable and 0 not in self._post.lost:
            os.kill(os.getpid(), signal.SIGKILL)  # mpirun would hang on a bad exit code
        os._exit(exit_code)

    @property
    def survivable(self) -> bool:
        """MPI lets the job outlive a lost rank: `mpirun --with-ft ulfm`."""
        name, version = MPI.get_vendor()
        if name != "Open MPI" or version < (5,):  # Open MPI 4 fails at the question
            return False
        address = self._comm.Get_attr(OPEN_MPI_FT)
        return isinstance(address, int) and ctypes.c_int.from_address(address).value != 0

    @property
    def library(self) -> str:
        """Which MPI this is."""
        name, numbers = MPI.get_vendor()
        return f"{name} {'.'.join(map(str, numbers))}"

    @property
    def thread_level(self) -> str:
        """How MPI lets threads call it."""
        names = {
            MPI.THREAD_SINGLE: "single",
            MPI.THREAD_FUNNELED: "funneled",
            MPI.THREAD_SERIALIZED: "serialized",
            MPI.THREAD_MULTIPLE: "multiple",
        }
        return names[MPI.Query_thread()]
