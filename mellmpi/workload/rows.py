"""Rows of a trace file: CSV or JSON Lines, gzipped or not, in one sequential read."""

import csv
import gzip
import io
import json
import os
import select
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mellmpi.workload.formats import column_name

FILLED_S = 5.0  # a pipe must have its first bytes within this time
LONGEST_LINE = 1 << 24  # characters; a prompt of a million tokens has some 500,000 in hash_ids
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
PACKED = {  # first bytes of files that are not text -> remedy
    b"\xff\xfe": "it is UTF-16; iconv -f UTF-16 -t UTF-8 converts it",
    b"\xfe\xff": "it is UTF-16; iconv -f UTF-16 -t UTF-8 converts it",
    b"version https://git-lfs": "it is a pointer of Git LFS; git lfs pull fetches the trace",
    b"PAR1": "it is Parquet; write it as CSV or JSON Lines",
    b"PK\x03\x04": "it is a zip archive; unpack it",
    b"BZh": "it is packed by bzip2; unpack it, or pack it by gzip",
    b"\xfd7zXZ": "it is packed by xz; unpack it, or pack it by gzip",
    b"\x28\xb5\x2f\xfd": "it is packed by zstd; unpack it, or pack it by gzip",
}
ONE_A_LINE = "one JSON object a line is expected, as jq -c writes them"


class _ReadAhead(io.RawIOBase):
    """Bytes that were read ahead, then the rest of the file: a pipe cannot seek."""

    def __init__(self, ahead: bytes, rest: io.BufferedReader):
        self._ahead, self._rest = ahead, rest

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        data = self._ahead[: len(into)] or self._rest.read1(len(into))
        self._ahead = self._ahead[len(data) :]
        into[: len(data)] = data
        return len(data)


def open_filled(path: Path) -> io.BufferedReader:
    """Open a file to read its bytes. ValueError if it is a pipe that stays empty for `FILLED_S`."""
    if not path.is_fifo():
        return path.open("rb")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for a writer
    file = os.fdopen(descriptor, "rb")
    if not select.select([descriptor], [], [], FILLED_S)[0]:
        file.close()
        raise ValueError(
            f"nothing comes from {path}: it is a pipe, and its writer must start "
            f"within {FILLED_S:g} s"
        )
    os.set_blocking(descriptor, True)
    return file


@dataclass
class TraceFile:
    """One file; `rows` updates `line` and `separator` as it reads."""

    path: Path
    line: int = 0  # number of lines read
    separator: str = ","  # between cells of CSV

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield line number and cells, by `column_name`, of each row. ValueError names the line."""
        try:
            with open_filled(self.path) as file:
                yield from self._parsed(self._lines(self._text(file)))
        except (OSError, EOFError, zlib.error) as error:
            why = error.strerror if isinstance(error, OSError) else None
            raise ValueError(f"{self.path} cannot be read: {why or error}") from error

    def _text(self, file: io.BufferedReader) -> io.TextIOWrapper:
        ahead = file.read(max(map(len, PACKED)))
        if unpack := next((how for first, how in PACKED.items() if ahead.startswith(first)), ""):
            raise ValueError(f"{self.path} cannot be read: {unpack}")
        whole: io.BufferedReader | gzip.GzipFile = io.BufferedReader(_ReadAhead(ahead, file))
        if ahead.startswith(b"\x1f\x8b"):
            whole = gzip.GzipFile(fileobj=whole)
        return io.TextIOWrapper(whole, "utf-8-sig", errors="surrogateescape")

    def _lines(self, text: io.TextIOWrapper) -> Iterator[str]:
        while line := text.readline(LONGEST_LINE + 1):
            self.line += 1
            if len(line) > LONGEST_LINE:
                raise self._wrong(
                    f"over {LONGEST_LINE:,} characters; one request a line is expected"
                )
            if "\0" in line:
                raise self._wrong("a NUL byte; iconv -f UTF-16 -t UTF-8 converts UTF-16")
            if not _is_utf8(line):
                raise self._wrong("not UTF-8 text; iconv -f LATIN1 -t UTF-8 converts Latin-1")
            yield line

    def _parsed(self, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        first = next((line for line in lines if line.strip()), "")
        is_json = first.lstrip().startswith(("{", "["))
        return (self._json_rows if is_json else self._csv_rows)(first, lines)

    def _csv_rows(self, first: str, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        self.separator = max(SEPARATORS, key=first.count)
        table = self._table(
            csv.reader(chain((first,), lines), delimiter=self.separator, skipinitialspace=True)
        )
        names = [column_name(name) for _, header in islice(table, 1) for name in header]
        if twice := [name for name, times in Counter(names).items() if name and times > 1]:
            raise self._wrong(f"two columns are named {twice[0]!r:.60}; remove one")
        for line, cells in table:
            yield line, self._cells(names, cells, line)

    def _table(self, rows: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
        start = self.line  # the header has been read to recognise the file type
        while True:
            try:
                cells = next(rows, None)
            except csv.Error as error:
                raise self._wrong(f"no CSV: {error}", start) from error
            if cells is None:
                return
            if len(cells) > 1 or "".join(cells).strip():
                yield start, cells
            start = self.line + 1

    def _cells(self, names: list[str], cells: list[str], line: int) -> dict[str, Any]:
        if "\n" in "".join(cells):
            raise self._wrong("a quotation mark is not closed", line)
        if len(cells) == len(names):
            return dict(zip(names, cells, strict=True))
        lacks = f"; {names[len(cells)]!r:.60} is missing" if len(cells) < len(names) else ""
        raise self._wrong(f"{len(cells)} cells, but the header has {len(names)}{lacks}", line)

    def _json_rows(self, first: str, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        for line in chain((first,), lines):
            if not line.strip():
                continue
            entry = self._decoded(line)
            if not isinstance(entry, dict):
                raise self._wrong(ONE_A_LINE)
            columns = {column_name(name): value for name, value in entry.items()}
            if len(columns) < len(entry):
                raise self._wrong("two columns have names that differ in case alone; remove one")
            yield self.line, columns

    def _decoded(self, line: str) -> Any:
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            why = str(error)
        except ValueError:
            why = "a number has too many digits"
        except RecursionError:
            why = "nested too deeply"
        raise self._wrong(f"no JSON: {why}; {ONE_A_LINE}")

    def _wrong(self, why: str, line: int | None = None) -> ValueError:
        return ValueError(f"{self.path}, line {line or self.line}: {why}")


def _is_utf8(line: str) -> bool:
    try:
        line.encode()  # undecodable bytes were read as lone surrogates
    except UnicodeEncodeError:
        return False
    return True
