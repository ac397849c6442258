"""Input is JSON Lines, plain or gzipped; other formats are refused with what to type."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.files import Source
from mellmpi.files.formats import PIECE_BYTES, GzipReader, TextReader, Unreadable

LINE = b'{"custom_id": "a", "body": {"prompt": "caf\xc3\xa9"}}\n'


def read_all(data, size=1 << 20, name="in.jsonl"):
    """Return the output of `TextReader` for `data` in pieces of `size`."""
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    read = TextReader(lambda: pieces.pop(0) if pieces else b"", Source(name))
    found = b""
    while (piece := read()) != b"":
        found += piece or b""
    return found


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        LINE,
        b"\xef\xbb\xbf" + LINE,
        b"\n \r\n" + LINE * 9,
        b"{}",
        b"garbage\n",
        b"[1, 2]\n" + LINE,
        b"[{}]\n" + LINE,
        b'{"custom_id": "torn", \n' + LINE,
        b"a, b\nc, d\n" + LINE,
        b"\x80\xff broken\n" + LINE,
        b'{"a": "\0"}\n',
    ],
)
def test_json_lines_are_passed_on_unchanged_even_if_some_are_invalid(data, size):
    assert read_all(data, size) == data
    assert read_all(gzip.compress(data), size) == data


@given(st.lists(st.binary(max_size=300), max_size=4), st.integers(1, 100))
def test_gzip_members_are_read_in_order_in_pieces_of_any_size(texts, size):
    texts = [b"{" + text for text in texts]
    data = b"".join(gzip.compress(text) + b"\0" * (len(text) % 3) for text in texts)
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    read = GzipReader(lambda: pieces.pop(0) if pieces else b"", Source(None))
    if texts:
        assert b"".join(iter(read, b"")) == b"".join(texts)


def test_a_gzip_bomb_is_unpacked_in_pieces():
    packed = gzip.compress(b"{" + b" " * (5 * PIECE_BYTES + 7))
    pieces = [packed, b""]
    read = GzipReader(lambda: pieces.pop(0) if pieces else b"", Source(None))
    sizes = [len(piece) for piece in iter(read, b"")]
    assert sum(sizes) == 5 * PIECE_BYTES + 8 and max(sizes) <= PIECE_BYTES


def test_a_first_line_that_is_an_object_is_returned_at_once():
    packed = zlib.compressobj(wbits=31)
    first = packed.compress(LINE) + packed.flush(zlib.Z_SYNC_FLUSH)
    for pieces in ([None, LINE[:9], None, LINE[9:]], [first[:1], None, first[1:9], first[9:]]):
        left = [*pieces]
        read = TextReader(lambda left=left: left.pop(0) if left else None, Source(None))
        assert b"".join(read() or b"" for _ in range(9)) == LINE


@pytest.mark.parametrize("cut", [3, 12, 25, -9, -1])
def test_a_cut_gzip_file_is_refused(cut):
    with pytest.raises(Unreadable, match="ends in the middle of its gzip data"):
        read_all(gzip.compress(LINE * 9)[:cut])


def test_damaged_gzip_data_is_refused():
    for where in (-2, -6, 14):  # length, check sum, data
        data = bytearray(gzip.compress(LINE * 9))
        data[where] ^= 0x55
        with pytest.raises(Unreadable, match="has damaged gzip data"):
            read_all(bytes(data))
    with pytest.raises(Unreadable, match="has damaged gzip data"):
        read_all(gzip.compress(LINE) + b"and more")


def tar(stream):
    return tarfile.open(fileobj=stream, mode="w")


def archive(make, name):
    stream = io.BytesIO()
    with make(stream) as opened:
        if isinstance(opened, zipfile.ZipFile):
            opened.writestr(name, LINE)
        else:
            info = tarfile.TarInfo(name)
            info.size = len(LINE)
            opened.addfile(info, io.BytesIO(LINE))
    return stream.getvalue()


PRETTY = json.dumps({"custom_id": "a", "body": {}}, indent=2).encode()
OTHER = {
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00rest", "zstd -dc in.jsonl | … -i -"),
    "xz": (lzma.compress(LINE), "xz -dc in.jsonl | … -i -"),
    "bzip2": (bz2.compress(LINE), "bzip2 -dc in.jsonl | … -i -"),
    "zip": (archive(lambda stream: zipfile.ZipFile(stream, "w"), "a"), "unzip -p in.jsonl"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00\x04rest", "7z x -so in.jsonl"),
    "Parquet": (b"PAR1\x15\x04rest", "a line of requests is a JSON object"),
    "gzipped twice": (gzip.compress(gzip.compress(LINE)), "zcat in.jsonl"),
    "binary data": (archive(tar, "a.jsonl"), "JSON object"),
    "UTF-16 text": (LINE.decode().encode("utf-16"), "iconv -f UTF-16 -t UTF-8 in.jsonl | … -i -"),
    "UTF-32 text": (LINE.decode().encode("utf-32"), "iconv -f UTF-32 -t UTF-8 in.jsonl | … -i -"),
    "UTF-16LE text": (LINE.decode().encode("utf-16le"), "iconv -f UTF-16LE -t UTF-8"),
    "UTF-16BE text": (LINE.decode().encode("utf-16be"), "iconv -f UTF-16BE -t UTF-8"),
    "UTF-32LE text": (LINE.decode().encode("utf-32le"), "iconv -f UTF-32LE -t UTF-8"),
    "UTF-32BE text": (LINE.decode().encode("utf-32be"), "iconv -f UTF-32BE -t UTF-8"),
    "one JSON array": (b" [\n" + LINE + b"," + LINE + b"]", "jq -c '.[]' in.jsonl | … -i -"),
    "JSON over several lines": (PRETTY, "jq -c . in.jsonl | … -i -"),
    "a table": (b"custom_id,prompt\n1,hello\n2,you\n", "a line of requests is a JSON object"),
    "HTML or XML": (b"<!DOCTYPE html>\n<html>\n", "a line of requests is a JSON object"),
}


@pytest.mark.parametrize("what", OTHER)
def test_another_format_is_refused_with_what_to_type(what):
    data, advice = OTHER[what]
    with pytest.raises(Unreadable) as refused:
        read_all(data)
    assert what in str(refused.value) and advice in str(refused.value)
    if "twice" not in what:
        with pytest.raises(Unreadable, match=what):
            read_all(gzip.compress(data))


@pytest.mark.parametrize(
    "data",
    [
        b"[" + LINE.strip() + b"]",
        b"[" + LINE.strip() + b",\n" + LINE + b"]\n",
        b"[\n  {\n" + b'"a": "' + b"x" * 100_000,
        PRETTY + b"\n" + PRETTY,
        b'{"custom_id": "a",\n "body": {}}\n',
        b'{\n  "custom_id": "' + b"x" * 100_000,
    ],
)
def test_json_that_is_not_json_lines_is_recognised_with_any_line_breaks(data):
    with pytest.raises(Unreadable, match="jq -c"):
        read_all(data)


def test_the_advice_for_a_pipe_names_no_file():
    with pytest.raises(Unreadable, match=r"standard input is .* type  … \| xz -dc \| … -i -"):
        read_all(lzma.compress(LINE), name=None)


def test_a_name_in_the_advice_is_quoted_for_the_shell_and_safe_for_a_terminal():
    with pytest.raises(Unreadable) as refused:
        read_all(lzma.compress(LINE), name="my file\x1b.xz")
    assert "'my file\\x1b.xz'" in str(refused.value)


def test_a_read_error_is_reported_with_its_reason():
    def broken():
        raise OSError(5, "Input/output error")

    with pytest.raises(Unreadable, match=r"-i in: reading failed \(Input/output error\)"):
        TextReader(broken, Source("in"))()


def test_raw_deflate_is_not_gzip():
    with pytest.raises(Unreadable, match=r"damaged|middle"):
        read_all(b"\x1f\x8b" + zlib.compress(LINE))
