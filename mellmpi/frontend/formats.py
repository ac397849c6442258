"""What an input file holds, recognised by its first bytes: JSON Lines, plain or gzipped, or else.

A file that certainly is something else is refused once, with the command that converts it, instead
of line by line.
"""

import json
import re
import shlex
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from mellmpi.frontend.visible import visible

Read = Callable[[], bytes | None]
"""Gives bytes, b"" at the end, or None while nothing has come. May raise OSError, Unreadable."""

GZIP = b"\x1f\x8b"
PIECE_BYTES = 1 << 20  # so many at most from one call of `read`
ENOUGH_BYTES = 1 << 12  # from so many on, the format is told by what has come
HEAD_BYTES = 1 << 16  # so many of them are looked at
BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark of UTF-8, and white space

FORMATS = (  # first bytes, name, command that makes text of it
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "zstd -dc"),
    (b"\xfd7zXZ\x00", "compressed with xz", "xz -dc"),
    (b"\x5d\x00\x00", "compressed with lzma", "xz -dc --format=lzma"),
    (b"BZh", "compressed with bzip2", "bzip2 -dc"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "lz4 -dc"),
    (b"\x1f\x9d", "compressed with compress", "zcat"),
    (GZIP, "gzipped twice", "zcat"),
    (b"PK\x03\x04", "a zip archive", "unzip -p"),
    (b"PK\x05\x06", "a zip archive without files", ""),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x -so"),
    (b"PAR1", "a Parquet file", ""),
    (b"ARROW1", "an Arrow file", ""),
    (b"SQLite format 3", "an SQLite database", ""),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "iconv -f UTF-16 -t UTF-8"),
)
WIDE = (  # ASCII in another encoding, without a byte order mark
    (rb"[^\0]\0\0\0", "UTF-32LE"),
    (rb"\0\0\0[^\0]", "UTF-32BE"),
    (rb"[^\0]\0[^\0]\0", "UTF-16LE"),
    (rb"\0[^\0]\0[^\0]", "UTF-16BE"),
)
EXAMPLE = (
    'a line of requests is a JSON object: {"custom_id": "1", "method": "POST", '
    '"url": "/v1/completions", "body": {"prompt": "Hi"}}'
)


class Unreadable(ValueError):
    """The input, or what is left of it, cannot be read; the text says what to type instead."""


@dataclass(frozen=True)
class Source:
    """How to speak of an input. `name` None: standard input."""

    name: str | None

    def __str__(self) -> str:
        return "standard input" if self.name is None else f"-i {visible(self.name)}"

    def through(self, command: str) -> str:
        """What to type to have `command` convert the input."""
        before = f"… | {command}"
        if self.name is not None:
            before = f"{command} {shlex.quote(visible(self.name))}"
        return f"type  {before} | … -i -"


class Decoded:
    """`read` of JSON Lines from a `read` of bytes: gunzips, and refuses other formats.

    Gives nothing before the first line is seen to be an object, or enough has come to be sure of
    another format.
    """

    def __init__(self, read: Read, source: Source, is_unpacked: bool = False):
        self._bytes, self._source, self._is_unpacked = read, source, is_unpacked
        self._head = b""
        self._read: Read | None = None  # once the format is known

    def __call__(self) -> bytes | None:
        """The next bytes of text. Raises Unreadable for what is no text, or is damaged."""
        if self._read is not None:
            return self._read()
        piece = self._piece()
        if piece is None:
            return None
        self._head += piece
        if piece and not _is_enough(self._head):
            return None
        self._read = self._opened()
        return self._read()

    def _piece(self) -> bytes | None:
        try:
            return self._bytes()
        except OSError as error:
            raise Unreadable(f"{self._source} cannot be read on: {error.strerror}") from error

    def _opened(self) -> Read:
        rest = _after(self._head, self._piece)
        if self._head.startswith(GZIP) and not self._is_unpacked:
            return Decoded(Gunzip(rest, self._source), self._source, is_unpacked=True)
        if problem := _problem(self._head[:HEAD_BYTES], self._source):
            raise Unreadable(problem)
        return rest


class Gunzip:
    """`read` of what a gzip file holds, member after member (RFC 1952)."""

    def __init__(self, read: Read, source: Source):
        self._read, self._source = read, source
        self._packed = b""
        self._member = zlib.decompressobj(wbits=31)

    def __call__(self) -> bytes | None:
        while True:
            if not self._packed:
                piece = self._read()
                if piece is None:
                    return None
                if not piece:
                    return self._end()
                self._packed = piece
            if text := self._unpack():
                return text

    def _end(self) -> bytes:
        if not self._member.eof:
            raise Unreadable(f"{self._source} ends in the middle of its gzip data: copy it again")
        return b""

    def _unpack(self) -> bytes:
        if self._member.eof:
            self._packed = self._packed.lstrip(b"\0")  # padding, of tapes
            if not self._packed:
                return b""
            self._member = zlib.decompressobj(wbits=31)
        try:
            text = self._member.decompress(self._packed, PIECE_BYTES)
        except zlib.error as error:
            raise Unreadable(f"{self._source} has damaged gzip data ({error})") from error
        self._packed = self._member.unconsumed_tail or self._member.unused_data
        return text


def _after(head: bytes, read: Read) -> Read:
    """`read` that gives `head` first."""
    first = [head] if head else []
    return lambda: first.pop() if first else read()


def _is_enough(head: bytes) -> bool:
    """Does this say what the format is?"""
    if len(head) >= ENOUGH_BYTES or head.startswith(GZIP):
        return True
    first, end, _ = head.lstrip(BLANK).partition(b"\n")
    return bool(end) and first.startswith(b"{") and first.rstrip().endswith(b"}")


def _problem(head: bytes, source: Source) -> str:
    """Why this is the beginning of no JSON Lines, and what to type; "" if it may be."""
    for first, what, command in (*FORMATS, *_guesses(head)):
        if head.startswith(first):
            advice = source.through(command) if command else EXAMPLE
            return f"{source} is {what}: {advice}"
    return ""


def _guesses(head: bytes) -> list[tuple[bytes, str, str]]:
    """A row as in FORMATS, for what can be told by more than the first bytes."""
    for pattern, encoding in WIDE:
        if re.match(pattern, head, re.DOTALL):
            return [(b"", f"{encoding} text", f"iconv -f {encoding} -t UTF-8")]
    text = head.lstrip(BLANK)
    if text.startswith(b"{"):
        pretty = _is_spread_object(text)
        return (
            [(b"", "JSON over several lines, not one object a line", "jq -c .")] if pretty else []
        )
    if b"\0" in head[:512]:
        return [(b"", "binary data", "")]
    if _is_array(text):
        return [(b"", "one JSON array, not one object a line", "jq -c '.[]'")]
    if re.search(rb"^[ \t]*\{", text, re.MULTILINE):
        return []  # there are requests among whatever it is
    if text.startswith(b"<"):
        return [(b"", "HTML or XML", "")]
    return [(b"", "a table (CSV)", "")] if _is_table(text) else []


def _is_spread_object(text: bytes) -> bool:
    """Is the first object longer than its line?"""
    first, _, rest = text.partition(b"\n")
    if first.strip() == b"{":
        return rest.lstrip().startswith(b'"')
    decoded = text.decode("utf-8", "replace")
    try:
        _, end = json.JSONDecoder().raw_decode(decoded)
    except (ValueError, RecursionError):
        return False
    return "\n" in decoded[:end]


def _is_array(text: bytes) -> bool:
    """Does it begin with an array of objects that is no line of its own among others?"""
    if not re.match(rb"\[\s*\{", text):
        return False
    first, _, rest = text.partition(b"\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()


def _is_table(text: bytes) -> bool:
    """Are the first lines names in columns, and as many values?"""
    lines = text.splitlines()[:2]
    for separator in (b",", b";", b"\t"):
        columns = [line.count(separator) for line in lines]
        if len(lines) == 2 and 0 < columns[0] <= columns[1]:
            names = lines[0].split(separator)
            return all(re.fullmatch(rb'"?[A-Za-z_][\w .-]*"?', name.strip()) for name in names)
    return False
