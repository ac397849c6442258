"""Reads lines of a file or a pipe without blocking."""

import os
import select
from collections import deque
from dataclasses import dataclass

from mellmpi.files.formats import BLANK, PIECE_BYTES, Reader, Unreadable

MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its line end. `data` is None if the line is longer than the limit."""

    number: int  # from 1
    data: bytes | None

    @property
    def is_blank(self) -> bool:
        return self.data is not None and not self.data.strip(BLANK)


class LineReader:
    """Splits the bytes of a `Reader` into lines.

    If `read` raises Unreadable, the lines end with the last complete one, and `problem` says why.
    """

    def __init__(self, read: Reader, max_line_bytes: int = MAX_LINE_BYTES):
        self._read, self._max = read, max_line_bytes
        self.problem = ""
        self.max_lines: int | None = None  # lines to return; None: all
        self._lines: deque[bytes | None] = deque()
        self._rest: list[bytes] = []  # pieces of the incomplete line
        self._rest_bytes = 0
        self._number = 0
        self._at_end = False

    @property
    def exhausted(self) -> bool:
        """Whether no more lines will follow."""
        return self._number == self.max_lines or (self._at_end and not self._lines)

    def next(self) -> Line | None:
        """Return the next line; None at the end (`exhausted`), or if none is available yet."""
        if self._number == self.max_lines:
            return None
        while not self._lines and not self._at_end:
            try:
                piece = self._read()
            except Unreadable as error:
                self.problem, self._at_end = str(error), True
                break
            if piece is None:
                return None
            self._take(piece)
        if not self._lines:
            return None
        self._number += 1
        return Line(self._number, self._lines.popleft())

    def _take(self, piece: bytes) -> None:
        self._at_end = not piece
        *ended, rest = piece.split(b"\n")
        for line in ended:
            self._append(line)
            self._end_line()
        self._append(rest)
        if self._at_end and self._rest_bytes:
            self._end_line()

    def _append(self, piece: bytes) -> None:
        self._rest_bytes += len(piece)
        if self._rest_bytes <= self._max:
            self._rest.append(piece)
        else:
            self._rest.clear()

    def _end_line(self) -> None:
        self._lines.append(b"".join(self._rest) if self._rest_bytes <= self._max else None)
        self._rest, self._rest_bytes = [], 0


def count_lines(lines: LineReader) -> int:
    """Read all lines and return the number of those that are not blank. Raises Unreadable."""
    count = 0
    while not lines.exhausted:
        line = lines.next()
        count += line is not None and not line.is_blank
    if lines.problem:
        raise Unreadable(lines.problem)
    return count


def descriptor_reader(descriptor: int) -> Reader:
    """Return a `Reader` of an open file, pipe or terminal."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)

    def read() -> bytes | None:
        return os.read(descriptor, PIECE_BYTES) if poll.poll(0) else None

    return read
