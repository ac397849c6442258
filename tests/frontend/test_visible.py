"""Text of users does nothing to a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.frontend import visible, visible_lines


@given(st.text(st.characters(codec=None)))
def test_no_control_character_and_no_surrogate_is_left(text):
    assert all(
        char.isprintable() or char in "\xa0\xad" or ord(char) > 0x9F for char in visible(text)
    )
    visible(text).encode("utf-8")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("one\r\ntwo\tthree", "one\\r\\ntwo\\tthree"),
        ("\x9b2J\u202eleft\ud800", "\\x9b2J\\u202eleft\\ud800"),
        ("Grüße, 你好 👩‍💻 [red] \\", "Grüße, 你好 👩‍💻 [red] \\"),
    ],
)
def test_what_a_terminal_would_act_upon_becomes_an_escape_and_nothing_else_changes(text, shown):
    assert visible(text) == shown


def test_lines_stay_lines():
    assert visible_lines("a\n\tb\r\n\x1bc") == "a\n    b\\r\n\\x1bc"
