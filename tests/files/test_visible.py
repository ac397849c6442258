"""Text of users is printed without effect on the terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.files import visible, visible_lines


@given(st.text(st.characters(codec=None)))
def test_no_control_character_or_surrogate_is_left(text):
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
def test_unsafe_characters_become_escapes_and_all_others_stay(text, shown):
    assert visible(text) == shown


def test_visible_lines_keeps_line_ends():
    assert visible_lines("a\n\tb\r\n\x1bc") == "a\n    b\\r\n\\x1bc"
