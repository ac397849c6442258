"""Standard input of rank 0, as it really is behind mpirun.

Open MPI 5's mpirun reads its own standard input and passes it on to rank 0 through a pipe, which
it never closes (fixed in PMIx by openpmix#4024): a reader would wait for the end for ever. On
the same host what mpirun reads can be looked at: once that has ended, and nothing has come for a
while, neither will anything come.
"""

import fcntl
import os
import select
import stat
import termios
import time

LAUNCHERS = ("prterun", "mpirun", "orterun", "mpiexec")
FIRST_BYTES_S = 2.0  # so long an open pipe may take before it counts as empty
QUIET_S = 0.5  # mpirun passes on within this what it has read
PIECE_BYTES = 1 << 20


class StandardInput:
    """What was piped into the command, if anything was."""

    def __init__(self) -> None:
        self._behind = _launcher_input()
        self._last_s = time.monotonic()

    def is_piped(self) -> bool:
        """Are there bytes? Waits a little for the first; a terminal or /dev/null has none."""
        what = os.fstat(0 if self._behind is None else self._behind)
        if stat.S_ISCHR(what.st_mode):
            return False
        until_s = time.monotonic() + FIRST_BYTES_S
        while time.monotonic() < until_s:
            if self._readable():
                return _bytes_waiting(0) > 0
            if self._ended():
                return False
            time.sleep(0.01)
        return False

    def read(self) -> bytes | None:
        """The next bytes; None: none yet; b"": none will come."""
        if self._readable():
            self._last_s = time.monotonic()
            return os.read(0, PIECE_BYTES)
        return b"" if self._ended() else None

    def _readable(self) -> bool:
        return bool(select.select([0], [], [], 0)[0])

    def _ended(self) -> bool:
        if self._behind is None or time.monotonic() - self._last_s < QUIET_S:
            return False
        return _at_end(self._behind)


def _launcher_input() -> int | None:
    """A descriptor of what mpirun reads, if it is mpirun that feeds this process."""
    parent = f"/proc/{os.getppid()}"
    try:
        with open(f"{parent}/comm") as comm:
            if comm.read().strip() not in LAUNCHERS:
                return None
        return os.open(f"{parent}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None  # a rank that prted started: mpirun is on another host, or closed its input


def _at_end(descriptor: int) -> bool:
    """Has everything been read from it, never to be written to again?"""
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return _parent_offset() >= os.fstat(descriptor).st_size
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    events = dict(poll.poll(0)).get(descriptor, 0)
    return bool(events & select.POLLHUP) and not events & select.POLLIN


def _parent_offset() -> int:
    """How far the launcher has read the file on its standard input."""
    with open(f"/proc/{os.getppid()}/fdinfo/0") as lines:
        return int(next(lines).split()[1])


def _bytes_waiting(descriptor: int) -> int:
    """Bytes that can be read now; 0 where a readable descriptor only has its end to tell."""
    if stat.S_ISREG((what := os.fstat(descriptor)).st_mode):
        return what.st_size - os.lseek(descriptor, 0, os.SEEK_CUR)
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4), "little")
