"""Items of answers: reasoning, text and tool calls."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.frontend.items import PLAIN, ItemLog, ItemParser, Markup, Reasoning, Text, merged
from mellmpi.frontend.tool_calls import Arguments, CallBegin, CallEnd

THINK = ("<think>", "</think>")
HERMES = Markup(calls=True, before_calls="<tool_call>", after_calls="</tool_call>", reasoning=THINK)
LLAMA = Markup(calls=True, before_calls="<|python_tag|>", bare=True, names=frozenset({"f", "g"}))
MISTRAL = Markup(calls=True, before_calls="[TOOL_CALLS]")
BARE = Markup(calls=True, bare=True, names=frozenset({"f"}))
INSIDE = Markup(reasoning=THINK, in_reasoning=True)
ONE = Markup(calls=True, before_calls="<tool_call>", after_calls="</tool_call>", parallel=False)
ALL = (PLAIN, HERMES, LLAMA, MISTRAL, BARE, INSIDE, ONE)


def items(markup, *pieces):
    parser = ItemParser(markup)
    found = [item for piece in pieces for item in parser.push(piece)]
    return merged(found + parser.finish())


def called(name, arguments="{}", complete=True):
    return [CallBegin(name), *([Arguments(arguments)] if arguments else []), CallEnd(complete)]


@pytest.mark.parametrize(
    ("markup", "text", "found"),
    [
        (PLAIN, " a <think>b</think><tool_call>", [Text(" a <think>b</think><tool_call>")]),
        (HERMES, "  hi \n", [Text("  hi \n")]),
        (HERMES, "\n<think>\nso\n</think>\n\nhi", [Reasoning("so"), Text("hi")]),
        (HERMES, "hi <think>so</think>", [Text("hi <think>so</think>")]),
        (HERMES, "<think>so", [Reasoning("so")]),
        (HERMES, "<think>a <tool_call> b</think>c", [Reasoning("a <tool_call> b"), Text("c")]),
        (INSIDE, "so</think>hi", [Reasoning("so"), Text("hi")]),
        (
            HERMES,
            'ok\n<tool_call>\n{"name": "f", "arguments": {"a": "}</tool_call>"}}\n</tool_call>\n',
            [Text("ok"), *called("f", '{"a": "}</tool_call>"}')],
        ),
        (
            HERMES,
            '<tool_call>{"arguments": {"a": [1, {}]}, "name": "f"}</tool_call>\n'
            '<tool_call>{"name": "g"}</tool_call> bye',
            [*called("f", '{"a": [1, {}]}'), *called("g"), Text("bye")],
        ),
        (
            LLAMA,
            ' {"name": "f", "parameters": {}}; {"type": "function", "name": "g", "parameters": {}}',
            [*called("f"), *called("g")],
        ),
        (LLAMA, 'a<|python_tag|>{"name": "f", "parameters": {}}', [Text("a"), *called("f")]),
        (LLAMA, 'a {"name": "f", "parameters": {}}', [Text('a {"name": "f", "parameters": {}}')]),
        (
            MISTRAL,
            '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "h", "arguments": {}}]',
            [*called("f"), *called("h")],
        ),
        (MISTRAL, '[TOOL_CALLS][{"name": "f"}] more', [*called("f"), Text("more")]),
        (
            BARE,
            '[{"name": "f", "arguments": {"x": "\\u00e9"}}]',
            called("f", '{"x": "\\u00e9"}'),
        ),
        (ONE, '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}', called("f")),
    ],
)
def test_what_is_found(markup, text, found):
    assert items(markup, text) == found


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        (HERMES, "a <tool_call> b"),
        (HERMES, "a <tool_call>"),
        (HERMES, 'a  <tool_call>{"name": "f", "arguments": 3}</tool_call> '),
        (HERMES, '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f" "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "f", "nam'),
        (HERMES, "<tool_call></tool_call>"),
        (BARE, '{"name": "someone", "arguments": {}}'),
        (BARE, '{"name": "f"}'),
        (BARE, '{"name": "f", "age": 3}'),
        (BARE, "[1, 2, 3]"),
        (BARE, "[]"),
        (BARE, " \n"),
        (MISTRAL, '[TOOL_CALLS][{"name": 1}]'),
        (BARE, '{"a": ' + "[" * 200),
        (BARE, '{"a": 1e999, "name": "f", "arguments": {}}'),
    ],
)
def test_what_cannot_be_read_is_text(markup, text):
    assert items(markup, text) == [Text(text)]


@pytest.mark.parametrize(
    ("arguments", "kept", "rest"),
    [
        ('{"a": "x', '{"a": "x', ""),
        ('{"a": tru', '{"a": tru', ""),
        ('{"a": trux}}', '{"a": trux', "}}"),
        ("{'a': 1}}", "{", "'a': 1}}"),
        ('{"a": "\n"}}', '{"a": "', '\n"}}'),
        ('{"a": "\\x"}}', '{"a": "\\', 'x"}}'),
        ('{"a": 01}}', '{"a": 01', "}}"),
        ('{"a": 1]}', '{"a": 1', "]}"),
        ('{}, "arguments": {}}', "{}", "{}}"),
    ],
)
def test_arguments_that_break_off_end_the_call(arguments, kept, rest):
    text = '<tool_call>{"name": "f", "arguments": ' + arguments
    assert items(HERMES, text) == called("f", kept, False) + ([Text(rest)] if rest else [])


FRAGMENTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"),
    *('{"name": "f", ', '"arguments": {', '"parameters": {"a": [1, "}"]}', '"x": "\\"é', "}}", "}"),
    *("{", "[", "]", ",", ";", " ", "\n", '"', "\\", "日本", "text", "<", "<tool", "true", "-1e3"),
    *('{"name": "g", "arguments": {"q": {"r": null}}}', '{"name": "f", "parameters": {}}'),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


@given(st.sampled_from(ALL), TEXTS, st.data())
def test_items_do_not_depend_on_how_the_text_is_cut(markup, text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = items(markup, *pieces)
    assert found == items(markup, *text)
    depth = 0
    for item in found:
        match item:
            case CallBegin(name):
                assert depth == 0 and name
                depth = 1
            case Arguments():
                assert depth == 1
            case CallEnd():
                assert depth == 1
                depth = 0
            case Text(part) | Reasoning(part):
                assert depth == 0 and part and part in text
    assert depth == 0


@given(st.sampled_from(ALL), TEXTS)
def test_arguments_of_complete_calls_are_objects(markup, text):
    found = items(markup, text)
    for arguments, end in itertools.pairwise(found):
        if end == CallEnd(True):
            assert isinstance(json.loads(arguments.text), dict)


@given(st.sampled_from((PLAIN, HERMES, BARE)), st.text("<{ax \n>", max_size=20))
def test_no_text_is_lost_where_there_is_no_call(markup, text):
    assert "".join(item.text for item in items(markup, text)) == text


def test_a_log_counts_the_items_of_each_token():
    log = ItemLog(HERMES)
    for token in ("a", " ", "<tool_call>", '{"name": "f", "arguments": {', "}", "}", "x"):
        log.push(token)
    assert log.passed == [1, 1, 1, 3, 4, 5, 6]
    log.finish("")
    assert log.has_calls and len(log.items) == 6


def test_reasoning_tokens_are_counted():
    log = ItemLog(HERMES)
    for token in ("<think>", "a", "b", "</think>", "c"):
        log.push(token)
    assert log.num_reasoning_tokens == 4


def test_arguments_nested_too_deeply_for_other_readers_break_off():
    deep = '{"a": ' * 150 + "1" + "}" * 150
    found = items(HERMES, '<tool_call>{"name": "f", "arguments": ' + deep)
    assert found[2] == CallEnd(False) and isinstance(found[3], Text)
