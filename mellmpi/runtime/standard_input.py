"""Standard input of rank 0 under mpirun.

Open MPI 5's mpirun passes its standard input on to rank 0 through a pipe that it never closes
(fixed in PMIx by openpmix#4024), so that a reader never sees the end. Rank 0 therefore inspects the
standard input of mpirun on the same host: when that has ended, and no bytes have arrived for
QUIET_S, the input has ended.
"""

import fcntl
import os
import re
import select
import stat
import sys
import termios
import time

from mellmpi.config import UsageError

LAUNCHERS = ("prterun", "mpirun", "orterun", "mpiexec")
FIRST_BYTES_S = 2.0  # an open pipe without bytes for this time counts as empty
QUIET_S = 0.5  # mpirun passes on what it has read within this time
PIECE_BYTES = 1 << 20


class StandardInput:
    """The standard input of the command."""

    def __init__(self) -> None:
        self._launcher_input = _launcher_input()
        self._last_s = time.monotonic()

    def is_piped(self) -> bool:
        """Return whether bytes were piped in. Waits up to FIRST_BYTES_S for the first.

        A terminal or /dev/null counts as not piped.
        """
        if sys.stdin is None:  # closed
            return False
        status = os.fstat(0 if self._launcher_input is None else self._launcher_input)
        if stat.S_ISCHR(status.st_mode):
            return False
        until_s = time.monotonic() + FIRST_BYTES_S
        while time.monotonic() < until_s:
            if self._readable():
                return _bytes_waiting(0) > 0
            if self._ended():
                return False
            time.sleep(0.01)
        return False

    def check(self) -> None:
        """Raise UsageError if nothing can be read, or if the end could not be detected."""
        if sys.stdin is None:
            raise UsageError("standard input is closed; give a file of requests with -i")
        if _launcher() is not None and (what := _endless(f"{_launcher()}/fd/0")):
            raise UsageError(
                f"standard input is {what}, and mpirun does not pass on its end; "
                "type  cat | mpirun … -i -"
            )

    def read(self) -> bytes | None:
        """Return the next bytes; None: none available yet; b"": the end."""
        if self._readable():
            self._last_s = time.monotonic()
            return os.read(0, PIECE_BYTES)
        return b"" if self._ended() else None

    def _readable(self) -> bool:
        return bool(select.select([0], [], [], 0)[0])

    def _ended(self) -> bool:
        if self._launcher_input is None or time.monotonic() - self._last_s < QUIET_S:
            return False
        return _at_end(self._launcher_input)


def descriptor_path(name: str) -> str:
    """Return the path to open for /dev/fd/N, the name that a shell gives to <(…) and >(…).

    mpirun inherits descriptor N, but does not pass it on: the path names it in mpirun's process.
    Other names are returned unchanged. Raises UsageError if mpirun has no such descriptor.
    """
    found = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", name)
    if found is None or int(found[1]) <= 2 or (launcher := _launcher()) is None:
        return name
    try:  # a descriptor that mpirun opened itself has O_CLOEXEC
        inherited = not int(_of_descriptor(launcher, found[1], "flags"), 8) & os.O_CLOEXEC
    except OSError:
        inherited = False
    if not inherited:
        raise UsageError(
            f"{name} is not open in mpirun; give the name of a file, or type  "
            "cat FILE | mpirun … -i -"
        )
    return f"{launcher}/fd/{found[1]}"


def _launcher() -> str | None:
    """Return the /proc directory of mpirun if mpirun is the parent of this process."""
    parent = f"/proc/{os.getppid()}"
    try:
        with open(f"{parent}/comm") as comm:
            return parent if comm.read().strip() in LAUNCHERS else None
    except OSError:
        return None


def _launcher_input() -> int | None:
    """Return a descriptor of mpirun's standard input if mpirun is the parent of this process."""
    try:
        return os.open(f"{_launcher()}/fd/0", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None  # started by prted: mpirun is on another host, or has closed its input


def _endless(path: str) -> str:
    """Return the kind of an input whose end `_at_end` cannot detect; else ""."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    if stat.S_ISSOCK(status.st_mode):
        return "a socket"
    is_null = status.st_rdev == os.stat(os.devnull).st_rdev
    return "a terminal" if stat.S_ISCHR(status.st_mode) and not is_null else ""


def _at_end(descriptor: int) -> bool:
    """Return whether all bytes have been read and no more can follow."""
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        offset = int(_of_descriptor(f"/proc/{os.getppid()}", "0", "pos"))
        return offset >= os.fstat(descriptor).st_size
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    events = dict(poll.poll(0)).get(descriptor, 0)
    return bool(events & select.POLLHUP) and not events & select.POLLIN


def _of_descriptor(process: str, descriptor: str, key: str) -> str:
    """Return a field of fdinfo (proc(5)). Raises OSError if there is no such descriptor."""
    with open(f"{process}/fdinfo/{descriptor}") as lines:
        return next(line.split()[1] for line in lines if line.startswith(f"{key}:"))


def _bytes_waiting(descriptor: int) -> int:
    """Return the number of bytes that can be read now; 0 at the end."""
    if stat.S_ISREG((status := os.fstat(descriptor)).st_mode):
        return status.st_size - os.lseek(descriptor, 0, os.SEEK_CUR)
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4), "little")
