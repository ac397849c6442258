"""Grammars of answers with tool calls or reasoning, in llguidance's variant of Lark."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mellmpi.frontend.fields import BadRequest, Fields
from mellmpi.frontend.grammar import WHITESPACE, grammar_text
from mellmpi.frontend.items import Markup
from mellmpi.frontend.json_schema import check_schema
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.frontend.tool_formats import ToolFormat, tool_format
from mellmpi.frontend.tools import Function, Tools

Schema = Mapping[str, Any]


def answer_grammar(
    fields: Fields, tokenizer: Tokenizer, tools: Tools | None, markup: Markup | None
) -> tuple[str, str, Markup | None]:
    """Return (grammar of the answer to a body, field that asks for it, markup of the answer).

    A response_format is for the text after reasoning, if no call is made. Under another grammar the
    whole answer is text. The grammar is "" if none is needed.
    """
    text, name = grammar_text(fields)
    if markup is None:
        return text, name, None
    if text and name != "response_format":
        if tools is not None:
            raise BadRequest(f"{name} cannot be used with tools", name)
        return text, name, None
    schema = _content_schema(fields.get("response_format", dict)) if text else None
    if tools is not None:
        return _tools_grammar(tokenizer, tools, markup, schema), "tools", markup
    if schema is None:
        return "", "", markup
    lines: list[str] = []
    return _grammar(tokenizer, markup, _content(schema, lines), lines, True), name, markup


def _content_schema(response_format: Any) -> Schema:
    """Return the schema of a valid response_format."""
    inner = response_format.get("json_schema")
    return inner["schema"] if response_format["type"] == "json_schema" else {"type": "object"}


def _content(schema: Schema, lines: list[str]) -> str:
    lines.append(f"content: %json {_json_rule(schema, 'response_format')}")
    return "content"


def _json_rule(schema: Schema, field: str) -> str:
    guidance = {"whitespace_pattern": WHITESPACE}
    return json.dumps({**_checked(schema, field), "x-guidance": guidance})


def _checked(schema: Schema, field: str) -> Schema:
    schema = dict(schema)
    check_schema(schema, field)
    schema.pop("$schema", None)  # read as draft 2020-12
    return schema


def _tools_grammar(
    tokenizer: Tokenizer, tools: Tools, markup: Markup, schema: Schema | None
) -> str:
    """Return the grammar of an answer that may call tools.

    Of calls alone if a call is required; of calls or a text with a schema; of all answers whose
    calls are right if a function is strict; otherwise none.
    """
    strict = any(function.strict for function in tools.functions)
    if not tools.required and not strict and schema is None:
        return ""
    form = tool_format(tokenizer.template)
    if form.bare and schema is not None and not tools.required:
        lines = [f"content: %json {json.dumps(_call_or_content(form, tools, schema))}"]
        return _grammar(tokenizer, markup, "content", lines, True)
    lines = []
    for index, function in enumerate(tools.functions):
        opening = f'{{"name": {json.dumps(function.name)}, "{form.arguments}": '
        lines.append(f'call_{index}: {json.dumps(opening)} arguments_{index} "}}"')
        lines.append(f"arguments_{index}: %json {_arguments(function, tools.required, index)}")
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools.functions))))
    marks = _Marks(tokenizer, lines)
    closed = tools.required or schema is not None  # no other text is allowed
    answer = _calls(form, tools, marks) if closed else _any(form, tools, marks)
    if schema is not None and not tools.required:
        answer = f"{answer} | {_content(schema, lines)}"
    return _grammar(tokenizer, markup, answer, lines, closed)


def _call_or_content(form: ToolFormat, tools: Tools, schema: Schema) -> Schema:
    """Return a schema of one bare call, or of a text with a schema: both begin alike."""
    named = {"content": _checked(schema, "response_format")}
    calls = []
    for index, function in enumerate(tools.functions):
        arguments = f"arguments_{index}"
        named[arguments] = json.loads(_arguments(function, False, index))
        properties = {
            "name": {"const": function.name},
            form.arguments: {"$ref": f"#/$defs/{arguments}"},
        }
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": [*properties],
                "additionalProperties": False,
            }
        )
    moved = {name: _moved(part, f"#/$defs/{name}") for name, part in named.items()}
    return {
        "anyOf": [*calls, {"$ref": "#/$defs/content"}],
        "$defs": moved,
        "x-guidance": {"whitespace_pattern": WHITESPACE},
    }


def _moved(schema: Any, root: str) -> Any:
    """Return a schema whose references still hold when it is found at `root`."""
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: root + part[1:]
        if name == "$ref" and isinstance(part, str) and part.startswith("#")
        else _moved(part, root)
        for name, part in schema.items()
        if name != "x-guidance"
    }


def _grammar(
    tokenizer: Tokenizer, markup: Markup, answer: str, lines: list[str], closed: bool
) -> str:
    if markup.reasoning is not None:
        marks = _Marks(tokenizer, lines)
        answer = _reasoned(*markup.reasoning, markup.in_reasoning, answer, marks, closed)
    return "\n".join([f"start: {answer}", *lines])


def _arguments(function: Function, required: bool, index: int) -> str:
    if not required and not function.strict:
        return '{"type": "object"}'
    return _json_rule(function.parameters, f"tools[{index}].function.parameters")


@dataclass(frozen=True)
class _Marks:
    """Marks in a grammar, each of them a special token or text."""

    tokenizer: Tokenizer
    lines: list[str]  # of the grammar, to which rules are added

    def is_token(self, mark: str) -> bool:
        return self.tokenizer.special_id(mark) is not None

    def plain(self, mark: str) -> str:
        """Return the mark in the grammar."""
        token = self.tokenizer.special_id(mark)
        return json.dumps(mark) if token is None else f"<[{token}]>"

    def after_text(self, name: str, mark: str) -> str:
        """Return a rule for any text and then the mark."""
        if self.is_token(mark):
            self.lines.append(f"{name}: /(?s:.*)/ {self.plain(mark)}")
        else:  # lazy: it ends with the first mark
            self.lines.append(f"{name}[lazy]: /(?s:.*){_escaped(mark)}/")
        return name


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


def _calls(form: ToolFormat, tools: Tools, marks: _Marks) -> str:
    """Return a rule for calls alone."""
    between = json.dumps(form.between)
    if form.listed:
        return f"{marks.plain(form.before)} {_list(form, tools)}"
    block = "call"
    if form.after:
        block = f'{marks.plain(form.before)} "\\n" call "\\n" {marks.plain(form.after)}'
    return f"{block} ({between} {block})*" if tools.parallel else block


def _list(form: ToolFormat, tools: Tools) -> str:
    more = f"({json.dumps(form.between)} call)*" if tools.parallel else ""
    return f'"[" call {more} "]"'


def _any(form: ToolFormat, tools: Tools, marks: _Marks) -> str:
    """Return a rule for answers of text, calls, or both."""
    if form.bare:
        marks.lines.append(r"TEXT: /[^{\[\s](?s:.*)/")
        return f"(TEXT | {_calls(form, tools, marks)})?"
    marks.lines.append("TEXT: /(?s:.+)/")
    begin = marks.after_text("begin", form.before)
    if form.listed:
        return f"({begin} {_list(form, tools)})? TEXT?"
    return f'({begin} "\\n" call "\\n" {marks.plain(form.after)})* TEXT?'


def _reasoned(
    before: str, after: str, inside: bool, answer: str, marks: _Marks, closed: bool
) -> str:
    """Return a rule for an answer with reasoning before it."""
    if not inside and not closed and not marks.is_token(before):
        return answer  # the reasoning is text to it
    reasoning = f"{marks.after_text('reasoning', after)} /\\s*/"
    opened = reasoning if inside else f"({marks.plain(before)} {reasoning})?"
    return f"{opened} ({answer})"
