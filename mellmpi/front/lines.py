"""Lines of a file or a pipe, read without ever waiting for a writer."""

import os
import select
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

MAX_LINE_BYTES = 64 << 20
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its end. `data` is None where it was longer than the limit."""

    number: int  # from 1
    data: bytes | None


class LineReader:
    """Lines from `read`, which gives bytes, `b""` at the end, or None when there is none yet."""

    def __init__(self, read: Callable[[], bytes | None], max_line_bytes: int = MAX_LINE_BYTES):
        self._read, self._max = read, max_line_bytes
        self._lines: deque[bytes | None] = deque()
        self._rest: list[bytes] = []  # pieces of the line that has not ended
        self._rest_bytes = 0
        self._number = 0
        self._at_end = False

    @property
    def exhausted(self) -> bool:
        """No line will ever come again."""
        return self._at_end and not self._lines

    def next(self) -> Line | None:
        """The next line, or None: no more at all (`exhausted`), or none for now."""
        while not self._lines and not self._at_end:
            piece = self._read()
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
        whole = b"".join(self._rest) if self._rest_bytes <= self._max else None
        self._lines.append(whole)
        self._rest, self._rest_bytes = [], 0


def descriptor_reader(descriptor: int) -> Callable[[], bytes | None]:
    """`read` of an open file, pipe or terminal, for `LineReader`."""

    def read() -> bytes | None:
        ready, _, _ = select.select([descriptor], [], [], 0)
        return os.read(descriptor, PIECE_BYTES) if ready else None

    return read
