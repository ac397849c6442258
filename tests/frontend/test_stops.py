"""Stop strings end the text exactly where they begin, in whatever pieces it arrives."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mellmpi.frontend.stops import StopStrings

texts = st.text("abn\n", max_size=30)
stop_lists = st.lists(st.text("abn\n", min_size=1, max_size=4), max_size=4)


def feed(stops, pieces):
    stream = StopStrings(tuple(stops))
    passed = ""
    for piece in pieces:
        passed += stream.push(piece)
        if stream.found:
            return passed, True
    return passed + stream.finish(), False


@given(text=texts, stops=stop_lists, cuts=st.lists(st.integers(0, 30), max_size=6))
def test_text_ends_before_the_first_complete_stop_string(text, stops, cuts):
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    out, found = feed(stops, pieces)
    assert found == any(stop in text for stop in stops)
    if not found:
        assert out == text
    else:
        assert text.startswith(out) and any(text[len(out) :].startswith(stop) for stop in stops)
        assert not any(stop in out for stop in stops)


@given(text=texts, stops=stop_lists)
def test_text_in_single_characters_ends_where_a_search_finds_a_stop_string(text, stops):
    first = min(
        (end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)),
        default=None,
    )
    out, found = feed(stops, list(text))
    if first is None:
        assert (out, found) == (text, False)
    else:
        begins = min(first - len(stop) for stop in stops if text[:first].endswith(stop))
        assert (out, found) == (text[:begins], True)


def test_only_text_that_may_begin_a_stop_string_is_held_back():
    stream = StopStrings(("\n\nQ:",))
    assert stream.push("yes\n") == "yes"
    assert stream.push("and\n\n") == "\nand"
    assert stream.push("Q") == ""
    assert stream.push("uiet") == "\n\nQuiet"


def test_without_stop_strings_nothing_is_held_back():
    stream = StopStrings(())
    assert stream.push("anything\n") == "anything\n" and stream.finish() == ""
