"""Bodies of all dialects, valid but for random changes: a call or an error, never an exception."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mellmpi.frontend.dialects import CHAT, MESSAGES, RESPONSES, dialect_of
from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.strict_json import json_object
from tests.frontend.models_with_tools import MODELS

SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}
VALID = {
    CHAT: {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "be kind"}]},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "abcdefghi", "content": "x"},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    },
    RESPONSES: {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "abcdefghi", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "abcdefghi", "output": "x"},
        ],
        "instructions": "be kind",
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": True}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        "max_output_tokens": 5,
        "store": True,
    },
    MESSAGES: {
        "messages": [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "text", "text": "ok"},
                    {"type": "tool_use", "id": "abcdefghi", "name": "f", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "abcdefghi", "content": "x"},
                    {"type": "text", "text": "so?"},
                ],
            },
        ],
        "system": [{"type": "text", "text": "be kind"}],
        "max_tokens": 5,
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "f"},
        "thinking": {"type": "disabled"},
        "stop_sequences": ["x"],
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
    },
}
VALUES = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        1.5,
        10**400,
        "",
        "x",
        "\ud800",
        "{",
        "auto",
        [],
        [[]],
        [None],
        {},
        {"": {}},
    ]
)


def places(value, path=()):
    """Paths to all values within a value."""
    inner = enumerate(value) if isinstance(value, list) else ()
    for key, part in value.items() if isinstance(value, dict) else inner:
        yield (*path, key)
        yield from places(part, (*path, key))


@pytest.mark.parametrize("url", VALID)
@pytest.mark.parametrize("name", MODELS)
def test_valid_bodies_are_accepted(served, url, name):
    call = dialect_of(url).parse(url, {**VALID[url], "model": name}, served, "me")
    text = served.tokenizers[name].decode(list(call.prompts[0]))
    for part in ("be kind", "hi", '"f"', "x"):
        assert part in text
    assert "developer" not in text, "the templates know no such role"
    if name == "plain":
        assert '{"name": "f", "result": "x"}' in text
    assert call.markup.calls and "arguments_0" in call.samplings[0].grammar


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(VALID)), st.sampled_from(sorted(MODELS)), st.data())
def test_changed_bodies_are_accepted_or_refused(served, url, name, data):
    body = copy.deepcopy(VALID[url]) | {"model": name}
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(list(places(body))))
        at = body
        for key in path:
            at = at[key]
        if data.draw(st.booleans()):
            at[last] = copy.deepcopy(data.draw(VALUES))
        elif isinstance(at, dict):
            at[data.draw(st.sampled_from(["type", "name", "content", "x", "\ud800"]))] = "x"
        else:
            del at[last]
    dialect = dialect_of(url)
    try:
        dialect.parse(url, body, served, "me")
    except BadRequest as error:
        assert 400 <= error.status < 500
        json.dumps(dialect.error_body(error)).encode()


@pytest.mark.parametrize("depth", [20, 95, 101, 900, 990, 5000])
@pytest.mark.parametrize("url", VALID)
def test_deep_schemas_and_arguments_are_refused_or_fit(served, url, depth):
    """From the bytes of the body on; what is accepted can be written again."""
    deep = '{"a":' * depth + "1" + "}" * depth
    body = json.dumps({**VALID[url], "tool_choice": None, "model": "plain"})
    body = body.replace(json.dumps(SCHEMA), deep).replace('"{}"', json.dumps(deep))
    dialect = dialect_of(url)
    try:
        dialect.parse(url, json_object(body.encode()), served, "me")
    except BadRequest as error:
        assert depth > 90 or "not supported" in error.message or "schema" in error.message
