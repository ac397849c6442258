"""The parser of server-sent events gives the same events however the bytes are split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.loadgen import sse
from mellmpi.loadgen.sse import EventStream

DATA = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=12)
END = st.sampled_from(["\n", "\r\n", "\r"])
NOISE = st.sampled_from([": a comment", ":", "event: message", "id: 7", "retry: 10", "datum: x"])


@st.composite
def streams(draw):
    """(bytes of a stream, data of its events)."""
    text, events, end = "", [], draw(END)
    for _ in range(draw(st.integers(0, 5))):
        lines = draw(st.lists(DATA, min_size=1, max_size=3))
        for line in lines:
            text += draw(st.one_of(st.just(""), NOISE.map(lambda noise: noise + end)))
            text += f"data: {line}{end}"
        events.append("\n".join(lines))
        text += end
        if draw(st.booleans()):
            text += f": ping{end}{end}"
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode(), events


def parsed(pieces):
    stream = EventStream()
    found = [event for piece in pieces for event in stream.feed(piece)]
    return found + stream.finish()


@given(streams(), st.data())
def test_the_events_do_not_depend_on_how_the_bytes_are_split(stream, data):
    text, events = stream
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(pieces) == events


@given(streams())
def test_bytes_may_come_one_by_one(stream):
    text, events = stream
    assert parsed([text[i : i + 1] for i in range(len(text))]) == events


def test_an_event_is_given_as_soon_as_its_blank_line_has_come():
    stream = EventStream()
    assert stream.feed(b"data: a\n") == []
    assert stream.feed(b"\n") == ["a"]


def test_one_space_after_the_colon_is_no_data():
    assert parsed([b"data:a\n\ndata: b\n\ndata:  c\n\ndata\n\n"]) == ["a", "b", " c", ""]


def test_an_event_without_data_is_none():
    assert parsed([b"event: ping\n\n\n\n: x\n\n"]) == []


def test_an_event_that_the_end_cuts_before_its_blank_line_is_given():
    assert parsed([b"data: [DONE]"]) == parsed([b"data: [DONE]\r\n"]) == ["[DONE]"]


def test_a_line_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(sse, "LONGEST_LINE", 100)
    stream = EventStream()
    stream.feed(b"data: " + b"x" * 90)
    with pytest.raises(ValueError, match="over 100 bytes"):
        stream.feed(b"x" * 20)
