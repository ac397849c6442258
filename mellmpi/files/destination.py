"""Output files. They are checked for write access before anything else is done."""

import errno
import fcntl
import os
import select
import shlex
import stat
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mellmpi.config import UsageError
from mellmpi.files.inputs import kind_of
from mellmpi.files.resume import finished_ids
from mellmpi.files.visible import visible

READER_S = 2.0  # time for an output pipe to get a reader at the start


class Unwritable(Exception):
    """Writing to an open output failed. The text says why."""


@dataclass
class Destination:
    """The output of the answers, the report, the picture or the trace.

    A regular file is opened by the first write; `check_writable` opens everything else.
    """

    flag: str
    name: str  # as the user typed it
    path: str
    access: int = os.O_WRONLY  # os.O_RDWR, to resume
    descriptor: int | None = None  # None: not open

    def __str__(self) -> str:
        return f"{self.flag} {visible(self.name)}"

    def check_writable(self, created: ExitStack) -> os.stat_result:
        """Return the file's status. Raises UsageError if the file cannot be written.

        Closing `created` removes the file if this call has created it.
        """
        if self.descriptor is None:
            path, existed = os.path.realpath(self.path), os.path.exists(self.path)
            descriptor = self._open(0)
            if not existed:
                created.callback(os.unlink, path)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                created.callback(os.close, descriptor)
                return os.fstat(descriptor)
            self.descriptor = descriptor
        return os.fstat(self.descriptor)

    def resume(self) -> frozenset[str]:
        """Open to append answers. Returns the custom_ids that a regular file answers already.

        Raises UsageError if the file is not a batch output, cannot be changed, or is being written
        by another run.
        """
        if self.descriptor is not None:
            return frozenset()
        self.descriptor = self._open(os.O_APPEND)
        self._lock(self.descriptor)
        try:
            return finished_ids(self.descriptor, os.path.realpath(self.path))
        except OSError as error:
            raise UsageError(
                f"{self} has failed lines that cannot be removed: {error.strerror}; "
                f"{self._advice()}"
            ) from error
        except ValueError as error:
            raise UsageError(f"{self.flag} {error}") from error

    def append(self, data: bytes) -> None:
        """Write complete lines after `resume` or `begin`. Raises Unwritable."""
        assert self.descriptor is not None, "resume or begin must be called first"
        try:
            write_all(self.descriptor, data)
        except OSError as error:
            raise self._unwritable(error) from error

    def begin(self) -> None:
        """Open the file and remove its contents. Raises Unwritable."""
        try:
            if self.descriptor is None:
                self.descriptor = self._open(os.O_TRUNC)
        except UsageError as error:
            raise Unwritable(str(error)) from error

    def replace(self, data: bytes) -> None:
        """Replace the contents of the file by `data`. Raises Unwritable."""
        self.begin()
        self.append(data)
        self.flush()

    def flush(self) -> None:
        """Sync a regular file: some file systems report only then that they are full."""
        try:
            if self.descriptor is not None and stat.S_ISREG(os.fstat(self.descriptor).st_mode):
                os.fsync(self.descriptor)
        except OSError as error:
            raise self._unwritable(error) from error

    # --- opening ---------------------------------------------------------------------------------

    def _open(self, mode: int) -> int:
        try:
            if not os.path.exists(self.path) or os.path.isfile(self.path):
                return os.open(self.path, self.access | mode | os.O_CREAT, 0o666)
            if what := kind_of(os.stat(self.path)):
                raise UsageError(f"{self} is {what}; {self._advice()}")
            return self._open_pipe()
        except FileNotFoundError as error:
            directory = visible(str(Path(os.path.realpath(self.path)).parent))
            raise UsageError(f"{self}: there is no directory {directory}") from error
        except OSError as error:
            text = f"{self} cannot be written: {error.strerror}; {self._advice()}"
            raise UsageError(text) from error

    def _open_pipe(self) -> int:
        """Open a device, or a pipe that has a reader within READER_S."""
        until_s = time.monotonic() + READER_S
        while True:
            try:
                return os.open(self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                if time.monotonic() > until_s:
                    reader = f"cat {shlex.quote(visible(self.name))} > FILE &"
                    text = f"{self} is a pipe without a reader; first type  {reader}"
                    raise UsageError(text) from error
            time.sleep(0.01)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = f"{self} is being written by another run; wait for its end, or {self._advice()}"
            raise UsageError(text) from error
        except OSError:
            return  # the file system has no locks

    def _advice(self) -> str:
        return f"give another name with {self.flag}"

    def _unwritable(self, error: OSError) -> Unwritable:
        if isinstance(error, BrokenPipeError):
            return Unwritable(f"{self} is a pipe whose reader has ended")
        return Unwritable(f"{self} cannot be written: {error.strerror}")


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes, even if the descriptor is non-blocking. Raises OSError."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


def check_different(found: list[tuple[str, os.stat_result]]) -> None:
    """Raise UsageError if two of these (flag with name, status) are the same file or pipe."""
    for i, (later, status) in enumerate(found):
        for earlier, other in found[:i]:
            is_shared = stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)
            if is_shared and os.path.samestat(status, other):
                raise UsageError(f"{earlier} and {later} are the same file; give each its own")
