"""Formats of tool calls, and the grammars of answers that must or may have them."""

import pytest
from llguidance import LLMatcher, LLTokenizer

from mellmpi.frontend.openai import CHAT, parse
from mellmpi.frontend.tool_formats import HERMES, LLAMA_3, MISTRAL, PLAIN_JSON, tool_format
from tests.frontend.models_with_tools import MODELS

SHARED = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/number"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"number": {"type": "integer"}},
}
F = {"name": "f", "parameters": SHARED}
G = {"name": "g"}
GOOD, WRONG = {"a": 3}, {"a": "x"}


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{{ tools }}<tool_call>", HERMES),
        ("{{ tools }}<tool_call><function=", PLAIN_JSON),
        ("{{ tools }}[TOOL_CALLS]", MISTRAL),
        ("{{ tools }}[TOOL_CALLS]f[ARGS]", PLAIN_JSON),
        ("{{ tools }}<|python_tag|>", LLAMA_3),
        ('{{ tools }}{"name": function name, "parameters": dictionary of', LLAMA_3),
        ("{{ tools }}", PLAIN_JSON),
        ("<tool_call>", PLAIN_JSON),
    ],
)
def test_the_format_follows_from_the_template(template, found):
    assert tool_format(template) == found


@pytest.fixture
def accepts(served):
    """Return whether the grammar of a body accepts an answer; None: there is no grammar."""

    def check(name, answer, functions=(F, G), **body):
        tools = [{"type": "function", "function": function} for function in functions]
        messages = [{"role": "user", "content": "hi"}]
        given = {"model": name, "messages": messages, "tools": tools, **body}
        grammar = parse(CHAT, given, served, "me").samplings[0].grammar
        if not grammar:
            return None
        tokenizer = served.tokenizers[name]
        matcher = LLMatcher(LLTokenizer(tokenizer.json), grammar)
        tokens = tokenizer._backend.encode(answer, add_special_tokens=False).ids
        valid = matcher.validate_tokens(tokens)
        matcher.consume_tokens(tokens[:valid])
        return valid == len(tokens) and matcher.is_accepting()

    return check


def two_calls(name, arguments=GOOD):
    model = MODELS[name]
    text = model.between.join([model.call("f", arguments), model.call("g", {})])
    return text.replace("][TOOL_CALLS][", ", ")


NAMES = sorted(MODELS)


@pytest.mark.parametrize("name", NAMES)
def test_required_calls_are_all_there_is(accepts, name):
    model, before = MODELS[name], "hm</think>\n\n" if name.startswith("thinking") else ""
    for choice, functions in (("required", (F, G)), ({"type": "function", "function": F}, (F, G))):
        given = {"functions": functions, "tool_choice": choice}
        if isinstance(choice, dict):
            given["tool_choice"] = {"type": "function", "function": {"name": "f"}}
        assert accepts(name, before + model.call("f", GOOD), **given)
        assert not accepts(name, before + model.call("f", WRONG), **given)
        assert not accepts(name, before + "hi", **given)
        assert not accepts(name, before, **given)
        assert bool(accepts(name, before + two_calls(name), **given)) == (choice == "required")
    given = {"tool_choice": "required", "parallel_tool_calls": False}
    assert accepts(name, before + model.call("g", {}), **given)
    assert not accepts(name, before + two_calls(name), **given)


@pytest.mark.parametrize("name", NAMES)
def test_strict_functions_are_called_right_or_not_at_all(accepts, name):
    model, before = MODELS[name], "hm</think>\n" if name.startswith("thinking") else ""
    given = {"functions": ({**F, "strict": True}, {**G, "parameters": {"type": "object"}})}
    for text in ("", "hi", "hi {}", "日本"):
        assert accepts(name, before + text, **given)
    assert accepts(name, before + two_calls(name), **given)
    assert not accepts(name, before + model.call("f", WRONG), **given)
    assert accepts(name, before + model.call("g", {"any": "thing"}), **given)
    if name not in ("llama", "plain"):  # calls begin the answer there
        assert accepts(name, f"{before}Look:\n{two_calls(name)}", **given)
        assert not accepts(name, f"{before}Look:\n{model.call('f', WRONG)}", **given)


@pytest.mark.parametrize("name", NAMES)
def test_a_response_format_is_for_answers_without_calls(accepts, name):
    schema = {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    before = "hm</think>\n" if name.startswith("thinking") else ""
    strict = {"functions": ({**F, "strict": True}, G), "response_format": form}
    model = MODELS[name]
    assert accepts(name, before + model.call("f", WRONG), response_format=form)
    assert accepts(name, before + model.call("f", GOOD), **strict)
    assert not accepts(name, before + model.call("f", WRONG), **strict)
    assert accepts(name, before + '{"b": null}', response_format=form)
    assert not accepts(name, before + "hi", response_format=form)
    assert accepts(name, before + '{"b": null}', functions=(), response_format=form)


@pytest.mark.parametrize("name", NAMES)
def test_other_functions_need_no_grammar(accepts, name):
    assert accepts(name, "") is None


@pytest.mark.parametrize("name", ["thinking", "thinking as text"])
def test_optional_reasoning_comes_before_calls(accepts, name):
    given = {"chat_template_kwargs": {"enable_thinking": False}}
    call = MODELS[name].call("f", GOOD)
    for strict in (False, True):
        given["functions"] = ({**F, "strict": strict},)
        choice = "auto" if strict else "required"
        for before in ("", "<think>hm</think>\n"):
            assert accepts(name, before + call, tool_choice=choice, **given)
