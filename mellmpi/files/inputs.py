"""Opens the input of a job. A regular file is checked from end to end before anything else."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from mellmpi.config import UsageError
from mellmpi.files.formats import Reader, Source, TextReader, Unreadable
from mellmpi.files.lines import LineReader, count_lines, descriptor_reader

KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)
ADVICE = "give a file of requests, or type  cat FILE | … -i -"


@dataclass(frozen=True)
class Requests:
    """The lines of one input."""

    source: Source
    lines: LineReader
    count: int | None  # of lines that are not blank; None: unknown, the input is not a regular file


def kind_of(status: os.stat_result) -> str:
    """Return "a directory" or the like for a file that cannot be read or written; else ""."""
    return next((what for is_kind, what in KINDS if is_kind(status.st_mode)), "")


def is_descriptor(name: str, descriptor: int) -> bool:
    """Return whether `name` is another name of an open descriptor, as /dev/stdin is of 0.

    False for a regular file: it can be opened again and read from its beginning.
    """
    try:
        status = os.stat(name)
        return not stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.fstat(descriptor))
    except OSError:
        return False


def open_input(path: str, source: Source) -> int:
    """Open `path` for non-blocking reads. Returns the descriptor. Raises UsageError."""
    try:
        _check_kind(os.stat(path), source)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise UsageError(f"{source}: there is no such file; {ADVICE}") from error
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}; {ADVICE}") from error
    check_input(descriptor, source)
    return descriptor


def check_input(descriptor: int, source: Source) -> None:
    """Raise UsageError unless this is a regular file, a pipe, a terminal, a socket or /dev/null."""
    status = os.fstat(descriptor)
    if not stat.S_ISSOCK(status.st_mode):  # standard input may be a socket
        _check_kind(status, source)
    is_null = status.st_rdev == os.stat(os.devnull).st_rdev
    if stat.S_ISCHR(status.st_mode) and not is_null and not os.isatty(descriptor):
        raise UsageError(f"{source} is a device; {ADVICE}")


def _check_kind(status: os.stat_result, source: Source) -> None:
    if what := kind_of(status):
        raise UsageError(f"{source} is {what}; {ADVICE}")


def requests_in(descriptor: int, read: Reader, source: Source) -> Requests:
    """Return the requests of an open input; `read` returns its bytes.

    A regular file is read once from end to end. Raises UsageError if the file is damaged or is not
    JSON Lines.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return Requests(source, LineReader(TextReader(read, source)), None)
    start = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        count = count_lines(LineReader(TextReader(read, source)))
    except Unreadable as error:
        raise UsageError(str(error)) from error
    end = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, start, os.SEEK_SET)
    read = _complete_reader(descriptor, end, source)
    return Requests(source, LineReader(TextReader(read, source)), count)


def _complete_reader(descriptor: int, end: int, source: Source) -> Reader:
    """Return a `Reader` of a regular file that raises Unreadable if the file ends before `end`."""
    read = descriptor_reader(descriptor)

    def read_checked() -> bytes | None:
        piece = read()
        if not piece and os.lseek(descriptor, 0, os.SEEK_CUR) < end:
            raise Unreadable(f"{source} became shorter while it was read")
        return piece

    return read_checked
