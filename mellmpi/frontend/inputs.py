"""Where requests are read from: opened, and checked if it is a regular file, before all else."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from mellmpi.config import UsageError
from mellmpi.frontend.formats import Decoded, Read, Source, Unreadable
from mellmpi.frontend.lines import LineReader, count_lines, descriptor_reader

KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)
ADVICE = "give a file of requests, or type  cat FILE | … -i -"


@dataclass(frozen=True)
class Requests:
    """Lines to answer."""

    source: Source
    lines: LineReader
    count: int | None  # that are not blank; None: not known, as it is no regular file


def kind_of(status: os.stat_result) -> str:
    """What it is, where that can be neither read nor written as a file; "" otherwise."""
    return next((what for is_kind, what in KINDS if is_kind(status.st_mode)), "")


def is_descriptor(name: str, descriptor: int) -> bool:
    """Is `name` another name of what is open as `descriptor`, as /dev/stdin is of 0?

    Not for a regular file: it can be opened again, and read from its beginning.
    """
    try:
        status = os.stat(name)
        return not stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.fstat(descriptor))
    except OSError:
        return False


def open_input(path: str, source: Source) -> int:
    """A descriptor to read `path`, which never waits for a writer. UsageError if there is none."""
    try:
        _check_kind(os.stat(path), source)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise UsageError(f"{source}: there is no such file that can be read; {ADVICE}") from error
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}; {ADVICE}") from error
    check_input(descriptor, source)
    return descriptor


def check_input(descriptor: int, source: Source) -> None:
    """UsageError unless this is a regular file, a pipe, a terminal, a socket or /dev/null."""
    status = os.fstat(descriptor)
    if not stat.S_ISSOCK(status.st_mode):  # standard input may be one
        _check_kind(status, source)
    is_null = status.st_rdev == os.stat(os.devnull).st_rdev
    if stat.S_ISCHR(status.st_mode) and not is_null and not os.isatty(descriptor):
        raise UsageError(f"{source} is a device; {ADVICE}")


def _check_kind(status: os.stat_result, source: Source) -> None:
    if what := kind_of(status):
        raise UsageError(f"{source} is {what}; {ADVICE}")


def requests_in(descriptor: int, read: Read, source: Source) -> Requests:
    """What to answer from an open input; `read` gives its bytes.

    A regular file is read once from end to end. UsageError if it is damaged, or no JSON Lines.
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return Requests(source, LineReader(Decoded(read, source)), None)
    start = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        count = count_lines(LineReader(Decoded(read, source)))
    except Unreadable as error:
        raise UsageError(str(error)) from error
    end = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, start, os.SEEK_SET)
    return Requests(source, LineReader(Decoded(_whole(descriptor, end, source), source)), count)


def _whole(descriptor: int, end: int, source: Source) -> Read:
    """`read` of a regular file that raises Unreadable if the file ends before `end`, as it did."""
    read = descriptor_reader(descriptor)

    def whole() -> bytes | None:
        piece = read()
        if not piece and os.lseek(descriptor, 0, os.SEEK_CUR) < end:
            raise Unreadable(f"{source} became shorter while it was read")
        return piece

    return whole
