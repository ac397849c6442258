"""Standard input of rank 0, as it really is behind mpirun.

Open MPI 5's mpirun reads its own standard input and passes it on to rank 0 through a pipe, which
it never closes (fixed in PMIx by openpmix#4024): a reader would wait for the end for ever. On
the same host what mpirun reads can be looked at: once that has ended, and nothing has come for a
while, neither will anything come.
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
        if sys.stdin is None:  # closed
            return False
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

    def check(self) -> None:
        """UsageError where nothing can be read, or the end would never be seen."""
        if sys.stdin is None:
            raise UsageError("standard input is closed; give a file of requests with -i")
        if _launcher() is not None and (what := _endless(f"{_launcher()}/fd/0")):
            raise UsageError(
                f"standard input is {what}, whose end mpirun does not pass on; "
                "type  cat | mpirun … -i -"
            )

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


def descriptor_path(name: str) -> str:
    """Where to open /dev/fd/N, the name that a shell gives to <(…) and >(…); `name` if it is none.

    mpirun has inherited N, but does not pass it on. UsageError if mpirun has no such descriptor.
    """
    found = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", name)
    if found is None or int(found[1]) <= 2 or (launcher := _launcher()) is None:
        return name
    try:  # what mpirun has opened itself it closes in its children
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
    """The /proc directory of mpirun, if that is the parent of this process."""
    parent = f"/proc/{os.getppid()}"
    try:
        with open(f"{parent}/comm") as comm:
            return parent if comm.read().strip() in LAUNCHERS else None
    except OSError:
        return None


def _launcher_input() -> int | None:
    """A descriptor of what mpirun reads, if it is mpirun that feeds this process."""
    try:
        return os.open(f"{_launcher()}/fd/0", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None  # a rank that prted started: mpirun is on another host, or closed its input


def _endless(path: str) -> str:
    """What it is, if `_at_end` cannot tell its end; "" otherwise."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    if stat.S_ISSOCK(status.st_mode):
        return "a socket"
    is_null = status.st_rdev == os.stat(os.devnull).st_rdev
    return "a terminal" if stat.S_ISCHR(status.st_mode) and not is_null else ""


def _at_end(descriptor: int) -> bool:
    """Has everything been read from it, never to be written to again?"""
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        offset = int(_of_descriptor(f"/proc/{os.getppid()}", "0", "pos"))
        return offset >= os.fstat(descriptor).st_size
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    events = dict(poll.poll(0)).get(descriptor, 0)
    return bool(events & select.POLLHUP) and not events & select.POLLIN


def _of_descriptor(process: str, descriptor: str, key: str) -> str:
    """A field of a process's /proc/…/fdinfo. OSError if it has no such descriptor."""
    with open(f"{process}/fdinfo/{descriptor}") as lines:
        return next(line.split()[1] for line in lines if line.startswith(f"{key}:"))


def _bytes_waiting(descriptor: int) -> int:
    """Bytes that can be read now; 0 where a readable descriptor only has its end to tell."""
    if stat.S_ISREG((what := os.fstat(descriptor)).st_mode):
        return what.st_size - os.lseek(descriptor, 0, os.SEEK_CUR)
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4), "little")
