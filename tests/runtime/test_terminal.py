"""The terminal output is safe for any text of users and any kind of standard error."""

import io
import os

import pytest

from mellmpi.frontend import Answered, Counts
from mellmpi.runtime.terminal import StandardError, Terminal

WILD = ["[red]", "[/]", ":smile:", "\x1b[31m\x07", "\ud800", "\u202e", "x" * 9000, "a\r\nb", ""]


@pytest.fixture
def pipe():
    source, sink = os.pipe()
    os.set_blocking(source, False)
    yield source, sink
    os.close(source)


def shown(pipe, show):
    """Return the text that `show` writes to standard error."""
    source, sink = pipe
    kept = os.dup(2)
    os.dup2(sink, 2)
    try:
        show(Terminal(quiet=False, show=99))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
    return os.read(source, 1 << 16).decode()


@pytest.mark.parametrize("text", WILD)
def test_text_of_users_is_shown_unchanged_and_without_effect(pipe, text):
    def show(terminal):
        with terminal.working(text), terminal.progress(None, Counts()):
            terminal.show_text(Answered(1, f"id {text}", f"prompt {text}", f"text {text}", None))
            terminal.answered(Answered(1, "", "", "", None))
            terminal.answered(Answered(2, text, "", "", f"wrong {text}"))
        terminal.say(text)

    found = shown(pipe, show).replace("\r", "")
    assert "\x1b" not in found and "\x07" not in found and "\u202e" not in found
    if text.startswith(("[", ":")):
        for said in ("id", "prompt", "text", "wrong"):
            assert f"{said} {text}" in found
    assert all(len(line) < 400 for line in found.splitlines() if "xxx" in line) or "\nx" in found


def test_only_ascii_is_written_if_standard_error_is_ascii(pipe, monkeypatch):
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))

    def show(terminal):
        with terminal.working("models"), terminal.progress(3, Counts()):
            terminal.show_text(Answered(1, "é", "–", "你", None))

    found = shown(pipe, show)
    assert found.isascii() and "models ..." in found and "\\u4f60" in found


def test_a_full_pipe_without_reader_blocks_once_only(pipe, monkeypatch):
    monkeypatch.setattr("mellmpi.runtime.terminal.PATIENCE_MS", 1)
    source, sink = pipe
    stream = StandardError(sink)
    for _ in range(100):
        stream.write("x" * 5000)
    total = 0
    while (size := len(_read(source))) > 0:
        total += size
    assert 0 < total < 500_000
    stream.write("again")
    assert _read(source) == b"again"
    os.close(sink)


def _read(source):
    try:
        return os.read(source, 1 << 20)
    except BlockingIOError:
        return b""


@pytest.mark.parametrize("end", ["reader", "writer"])
def test_writing_to_a_closed_standard_error_raises_nothing(end):
    source, sink = os.pipe()
    stream = StandardError(sink)
    os.close(source)
    if end == "writer":
        os.close(sink)
    assert stream.write("text") == 4
    stream.flush()
    assert not stream.isatty()
    if end == "reader":
        os.close(sink)


def grown(number, text):
    return Answered(number, f"id{number}", f"prompt{number}", text, None)


def ended(number):
    return Answered(number, f"id{number}", "", "", None)


def test_the_first_answers_are_shown_while_they_grow_one_after_the_other(pipe):
    seen = []

    def show(terminal):
        terminal._show = 2
        with terminal.progress(9, Counts()):
            for number, text in (
                (1, "one "),
                (2, "two "),
                (3, "three "),
                (1, "more"),
                (2, "again "),
            ):
                terminal.show_text(grown(number, text))
                seen.append(os.read(pipe[0], 1 << 16).decode() if number == 1 else "")
            terminal.answered(ended(2))
            terminal.answered(ended(1))
            terminal.answered(ended(3))

    found = shown(pipe, show)
    assert "prompt1\none " in seen[0] and seen[3] == "more"
    assert "prompt2\ntwo again" in found, "it waited for the first one"
    assert "three" not in found


def test_no_bar_is_drawn_into_an_answer(pipe):
    def show(terminal):
        counts = Counts()
        with terminal.progress(9, counts) as advance:
            terminal.show_text(grown(1, "some "))
            counts.completed = 5
            advance(16)
            terminal.show_text(grown(1, "thing"))
            terminal.answered(ended(1))

    assert "some thing" in shown(pipe, show)


def test_where_answers_go_to_the_terminal_themselves_none_is_shown(pipe):
    assert not Terminal(quiet=True, show=3).shows
