"""Detects the format of an input from its first bytes: JSON Lines, plain or gzipped, or another.

An input that is certainly of another format is refused as a whole, with the command that converts
it, instead of line by line.
"""

import json
import re
import shlex
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from mellmpi.files.visible import visible

Reader = Callable[[], bytes | None]
"""Returns bytes, b"" at the end, or None if no data is available yet.

May raise OSError or Unreadable.
"""

GZIP = b"\x1f\x8b"
PIECE_BYTES = 1 << 20  # maximum of one call of a `Reader`
FORMAT_BYTES = 1 << 12  # received bytes that suffice to detect the format
HEAD_BYTES = 1 << 16  # maximum of bytes that are inspected
BLANK = b"\xef\xbb\xbf \t\r\n"  # the byte order mark of UTF-8, and white space

FORMATS = (  # first bytes, name, command that converts it to text
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
WIDE_ASCII = (  # ASCII in another encoding, without a byte order mark
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
    """The input, or the rest of it, cannot be read. The text says what to type instead."""


@dataclass(frozen=True)
class Source:
    """The name of an input for messages. `name` None: standard input."""

    name: str | None

    def __str__(self) -> str:
        return "standard input" if self.name is None else f"-i {visible(self.name)}"

    def conversion_hint(self, command: str) -> str:
        """Return what to type to convert the input with `command`."""
        source = f"… | {command}"
        if self.name is not None:
            source = f"{command} {shlex.quote(visible(self.name))}"
        return f"type  {source} | … -i -"


class TextReader:
    """A `Reader` of JSON Lines from a `Reader` of bytes: gunzips, and refuses other formats.

    Returns None until the first line is known to be an object, or until enough bytes have arrived
    to detect another format.
    """

    def __init__(self, read: Reader, source: Source, is_unpacked: bool = False):
        self._bytes, self._source, self._is_unpacked = read, source, is_unpacked
        self._head = b""
        self._read: Reader | None = None  # None: the format is not known yet

    def __call__(self) -> bytes | None:
        """Return the next bytes of text. Raises Unreadable for other formats and damaged data."""
        if self._read is not None:
            return self._read()
        piece = self._read_piece()
        if piece is None:
            return None
        self._head += piece
        if piece and not _shows_format(self._head):
            return None
        self._read = self._open()
        return self._read()

    def _read_piece(self) -> bytes | None:
        try:
            return self._bytes()
        except OSError as error:
            raise Unreadable(f"{self._source}: reading failed ({error.strerror})") from error

    def _open(self) -> Reader:
        rest = _with_head(self._head, self._read_piece)
        if self._head.startswith(GZIP) and not self._is_unpacked:
            return TextReader(GzipReader(rest, self._source), self._source, is_unpacked=True)
        if problem := _problem(self._head[:HEAD_BYTES], self._source):
            raise Unreadable(problem)
        return rest


class GzipReader:
    """A `Reader` of the contents of a gzip file, member after member (RFC 1952)."""

    def __init__(self, read: Reader, source: Source):
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
            self._packed = self._packed.lstrip(b"\0")  # padding, as tape archives have it
            if not self._packed:
                return b""
            self._member = zlib.decompressobj(wbits=31)
        try:
            text = self._member.decompress(self._packed, PIECE_BYTES)
        except zlib.error as error:
            raise Unreadable(f"{self._source} has damaged gzip data ({error})") from error
        self._packed = self._member.unconsumed_tail or self._member.unused_data
        return text


def _with_head(head: bytes, read: Reader) -> Reader:
    """Return a `Reader` that returns `head` first, then what `read` returns."""
    first = [head] if head else []
    return lambda: first.pop() if first else read()


def _shows_format(head: bytes) -> bool:
    """Return whether these bytes suffice to detect the format."""
    if len(head) >= FORMAT_BYTES or head.startswith(GZIP):
        return True
    first, end, _ = head.lstrip(BLANK).partition(b"\n")
    return bool(end) and first.startswith(b"{") and first.rstrip().endswith(b"}")


def _problem(head: bytes, source: Source) -> str:
    """Return why `head` cannot begin JSON Lines, and what to type; "" if it can."""
    for first, what, command in (*FORMATS, *_guessed_formats(head)):
        if head.startswith(first):
            advice = source.conversion_hint(command) if command else EXAMPLE
            return f"{source} is {what}: {advice}"
    return ""


def _guessed_formats(head: bytes) -> list[tuple[bytes, str, str]]:
    """Return rows as in FORMATS, for formats that the first bytes alone do not show."""
    for pattern, encoding in WIDE_ASCII:
        if re.match(pattern, head, re.DOTALL):
            return [(b"", f"{encoding} text", f"iconv -f {encoding} -t UTF-8")]
    text = head.lstrip(BLANK)
    if text.startswith(b"{"):
        row = (b"", "JSON over several lines, not one object per line", "jq -c .")
        return [row] if _is_multiline_object(text) else []
    if b"\0" in head[:512]:
        return [(b"", "binary data", "")]
    if _is_array(text):
        return [(b"", "one JSON array, not one object per line", "jq -c '.[]'")]
    if re.search(rb"^[ \t]*\{", text, re.MULTILINE):
        return []  # at least one line may be a request
    if text.startswith(b"<"):
        return [(b"", "HTML or XML", "")]
    return [(b"", "a table (CSV)", "")] if _is_table(text) else []


def _is_multiline_object(text: bytes) -> bool:
    """Return whether the first object spans several lines."""
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
    """Return whether the text is one array of objects, not a line that holds an array."""
    if not re.match(rb"\[\s*\{", text):
        return False
    first, _, rest = text.partition(b"\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()


def _is_table(text: bytes) -> bool:
    """Return whether the first two lines are column names and as many values."""
    lines = text.splitlines()[:2]
    for separator in (b",", b";", b"\t"):
        columns = [line.count(separator) for line in lines]
        if len(lines) == 2 and 0 < columns[0] <= columns[1]:
            names = lines[0].split(separator)
            return all(re.fullmatch(rb'"?[A-Za-z_][\w .-]*"?', name.strip()) for name in names)
    return False
