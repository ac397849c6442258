"""An MPI job from the view of one rank: its start, collective calls, the transport, its end."""

import atexit
import ctypes
import faulthandler
import os
import secrets
import signal
import sys
from typing import Any, NoReturn

from mellmpi.launcher import end_launcher
from mellmpi.protocol import FINGERPRINT, RankFailed
from mellmpi.transport.blocks import CmaProbe
from mellmpi.transport.control_plane import FAULT, USAGE, ControlPlane, PeerFailed
from mellmpi.transport.doorbell import Doorbell
from mellmpi.transport.endpoint import Endpoint, WaitPolicy
from mellmpi.transport.mpi.channel import MpiChannel, MpiLock, worker_of
from mellmpi.transport.mpi.library import MPI
from mellmpi.transport.mpi.yielding import set_yielding

END_LIMIT_S = 5.0  # of MPI_Finalize, where a rank that dies meanwhile would block the others
SPIN_S = 200e-6  # busy polling before the first sleep, while there is activity
LOCAL_POLL_S = 0.020  # longest sleep if every peer can ring: only failures come without a ring
OPEN_MPI_FT = 12  # MPI_FT in Open MPI's mpi.h; mpi4py has no name for it


class MixedInstallation(Exception):
    """Ranks run different versions of mellmpi."""


class MpiJob:
    """The MPI job that this process belongs to.

    All methods except `abort`, `fail` and `vanish` are collective: every rank calls them in the
    same order. They raise PeerFailed if another rank has died or failed.
    """

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size
        self._lock = MpiLock()
        try:
            channel = MpiChannel(self._comm, self._lock.acquire, self._lock.release)
        except MPI.Exception as error:
            raise PeerFailed(FAULT, f"mellmpi: a rank has died at the start ({error})") from error
        self._control = ControlPlane(self.rank, self.size, channel)
        names = self.gather(MPI.Get_processor_name().encode())
        self.hosts = [name.decode() for name in names]  # of every rank
        self._transport: Endpoint | None = None
        self._yielding = False  # the setting of this MPI, for its own waits
        if self.size == 1:
            atexit.register(self.finish)  # mpirun requires MPI_Finalize, and no rank can block it

    @property
    def local_ranks(self) -> list[int]:
        """All ranks of this host; the index of a rank in the list is its node-local rank."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]

    def check_installation(self, fingerprint: str = FINGERPRINT) -> None:
        """Raises MixedInstallation, on all ranks, if the fingerprints of the protocol differ."""
        seen = self.gather(fingerprint.encode())
        if odd := [rank for rank, other in enumerate(seen) if other != seen[0]]:
            hosts = ", ".join(sorted({self.hosts[rank] for rank in odd}))
            raise MixedInstallation(
                f"ranks {odd} (on {hosts}) run another version of mellmpi than rank 0 (on "
                f"{self.hosts[0]}); install the same version on every host"
            )

    def gather(self, data: bytes) -> list[bytes]:
        """Allgather: returns the data of every rank, by rank."""
        return self._control.gather(data)

    def share(self, data: Any) -> Any:
        """Broadcast rank 0's plain data (other ranks pass None). Returns it on every rank."""
        return self._control.share(data)

    def connect(
        self,
        idle_poll_s: float,
        device_buffers: bool = False,
        checksums: str = "auto",
        progress_thread: bool = True,
        cross_memory: bool = True,
    ) -> Endpoint:
        """Returns the transport of this rank.

        idle_poll_s      longest sleep between polls if a peer cannot ring our doorbell
        device_buffers   this MPI takes device memory (`devices.device_buffers_work`)
        checksums        of every block: "auto" (between hosts only), "always" or "never"
        progress_thread  move blocks in a separate thread, where MPI allows it
        cross_memory     read blocks from the memory of other processes, where the system allows it
        """
        bell = Doorbell(self.share(secrets.token_hex(8)), worker_of(self.rank))
        self.gather(b"")  # barrier: now every doorbell exists
        reachable = bell.find(worker_of(rank) for rank in self.local_ranks)
        rows = self.gather(bytes(worker_of(rank) in reachable for rank in range(self.size)))
        all_ring = all(row[self.rank] for row in rows)
        may_spin = len(self.local_ranks) <= len(os.sched_getaffinity(0))
        longest_s = LOCAL_POLL_S if all_ring else idle_poll_s
        wait_policy = WaitPolicy(all_ring, longest_s, SPIN_S if may_spin else 0.0)
        blocks = MpiChannel(self._comm, self._lock.acquire_after_messages, self._lock.release)
        self._transport = Endpoint(
            self._control,
            blocks,
            bell,
            wait_policy,
            device_buffers,
            self._checked(checksums),
            progress_thread and MPI.Query_thread() >= MPI.THREAD_SERIALIZED,
            self._read_by(cross_memory and not device_buffers),
        )
        self._yielding |= set_yielding(False)  # from here on no rank waits inside MPI
        return self._transport

    def _checked(self, checksums: str) -> frozenset[int]:
        """Workers whose blocks have checksums in both directions; both ends agree on it."""
        # Within a host the CPU copies blocks. A checksum would cost a third of the bandwidth there,
        # and memory has error correction of its own.
        exempt = set(self.local_ranks) if checksums == "auto" else set()
        ranks = range(self.size) if checksums != "never" else ()
        return frozenset(worker_of(rank) for rank in ranks if rank not in exempt)

    def _read_by(self, cross_memory: bool) -> frozenset[int]:
        """Workers that will read blocks from our memory: those whose CmaProbe succeeds."""
        probe = CmaProbe()
        probes = self.gather(probe.packed)
        others = set(self.local_ranks) - {self.rank} if cross_memory else set()
        readable = (rank in others and CmaProbe.readable(probes[rank]) for rank in range(self.size))
        rows = self.gather(bytes(readable))
        return frozenset(worker_of(rank) for rank in others if rows[rank][self.rank])

    def serve(self) -> None:
        """End the start phase: from now on the job survives failed workers, where MPI allows it."""
        self._control.starting = not self.survivable

    def finish(self) -> list[str]:
        """Shut MPI down. Returns, on rank 0, the error texts of workers that have failed."""
        if MPI.Is_finalized():
            return []
        if self._transport:
            self._transport.close()
        try:
            self._control.gather(b"")  # a barrier that sleeps: MPI_Finalize would spin
        except PeerFailed:
            if not self._control.lost:
                raise
        failures = [m.text for _, m in self._control.poll() if isinstance(m, RankFailed)]
        if self._control.lost:
            return failures  # MPI_Finalize may hang after a loss (seen in one of five runs)
        set_yielding(self._yielding)
        faulthandler.dump_traceback_later(END_LIMIT_S, exit=True)
        MPI.Finalize()
        faulthandler.cancel_dump_traceback_later()
        return failures

    def fail(self, exit_code: int, text: str) -> NoReturn:
        """End this rank after a failure, and the whole job unless it survives lost workers.

        Rank 0 prints the text. If the job goes on, the other ranks find this worker lost.
        """
        try:
            self._control.report_failure(exit_code, text)
            if not self._control.starting and exit_code != USAGE:
                self.vanish(exit_code)
            self._control.await_termination()
            if 0 not in self._control.lost:
                sys.stderr.write(f"{text}\n")  # rank 0 does not respond
        finally:
            self.abort(exit_code)

    def abort(self, exit_code: int) -> NoReturn:
        """End the whole job at once; `exit_code` must not be 0."""
        assert exit_code != 0, "with 0 the launcher would not end the other ranks"
        sys.stdout.flush()
        sys.stderr.flush()
        # Under ULFM mpirun ends no rank (seen with 5.0.11): each rank exits on our message.
        try:
            if not self._control.terminate_others(exit_code):
                self._end_all(exit_code)
        finally:
            os._exit(exit_code)

    def _end_all(self, exit_code: int) -> None:
        """Make the launcher end ranks that do not receive messages."""
        if self.survivable:
            end_launcher()
        else:
            self._comm.Abort(exit_code)

    def vanish(self, exit_code: int) -> NoReturn:
        """End only this process, at once: the other ranks find its worker lost."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.survivable and 0 not in self._control.lost:
            os.kill(os.getpid(), signal.SIGKILL)  # mpirun would hang on a bad exit code
        os._exit(exit_code)

    @property
    def survivable(self) -> bool:
        """The job can survive a lost rank (ULFM): `mpirun --with-ft ulfm`."""
        name, version = MPI.get_vendor()
        if name != "Open MPI" or version < (5,):  # Open MPI 4 fails on this attribute
            return False
        address = self._comm.Get_attr(OPEN_MPI_FT)
        return isinstance(address, int) and ctypes.c_int.from_address(address).value != 0

    @property
    def library(self) -> str:
        """Name and version of the MPI library."""
        name, numbers = MPI.get_vendor()
        return f"{name} {'.'.join(map(str, numbers))}"

    @property
    def thread_level(self) -> str:
        """The thread support that MPI provides, in words."""
        names = {
            MPI.THREAD_SINGLE: "single",
            MPI.THREAD_FUNNELED: "funneled",
            MPI.THREAD_SERIALIZED: "serialized",
            MPI.THREAD_MULTIPLE: "multiple",
        }
        return names[MPI.Query_thread()]
