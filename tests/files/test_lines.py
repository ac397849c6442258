"""Lines do not depend on the pieces in which they are read."""

import os

from hypothesis import given
from hypothesis import strategies as st

from mellmpi.files import LineReader, descriptor_reader


def reader(pieces, **limits):
    """Return a LineReader of `pieces`. A piece None means: no data yet."""
    left = [*pieces, b"", b""]
    return LineReader(lambda: left.pop(0), **limits)


def read_all(lines):
    found = []
    while not lines.exhausted:
        if (line := lines.next()) is not None:
            found.append((line.number, line.data))
    return found


@given(
    data=st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\xff", b"\r\n"]), max_size=20),
    gaps=st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_cuts_and_pauses_do_not_change_the_lines(data, gaps):
    pieces = []
    for piece, gap in zip(data, gaps, strict=False):
        pieces += [None, piece] if gap else [piece]
    expected = b"".join(data).split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    assert read_all(reader(pieces)) == list(enumerate(expected, start=1))


def test_a_line_over_the_limit_is_dropped_and_the_next_is_complete():
    pieces = [b"12345\n123", b"456", b"789\nok\n1234", b"56"]
    found = read_all(reader(pieces, max_line_bytes=5))
    assert found == [(1, b"12345"), (2, None), (3, b"ok"), (4, None)]


def test_a_pipe_without_data_does_not_block():
    source, sink = os.pipe()
    lines = LineReader(descriptor_reader(source))
    assert lines.next() is None and not lines.exhausted
    os.write(sink, b"one\ntw")
    assert lines.next().data == b"one"
    assert lines.next() is None and not lines.exhausted
    os.write(sink, b"o")
    os.close(sink)
    assert lines.next().data == b"two"
    assert lines.next() is None and lines.exhausted
    os.close(source)


def test_at_most_max_lines_are_read():
    pieces = [b"a\nb\n", b"c\n", b""]
    reader = LineReader(lambda: pieces.pop(0))
    reader.max_lines = 2
    assert [reader.next().data, reader.next().data, reader.next()] == [b"a", b"b", None]
    assert reader.exhausted and pieces == [b"c\n", b""]
