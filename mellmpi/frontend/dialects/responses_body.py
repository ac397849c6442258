"""Translates bodies of OpenAI's Responses into bodies of chats."""

from collections.abc import Iterator
from typing import Any

from mellmpi.frontend.dialects.translation import (
    SAMPLING,
    objects,
    text_at,
    texts,
    unsupported_part,
)
from mellmpi.frontend.fields import BadRequest, Fields, check_names

KNOWN = (
    "model",
    "input",
    "instructions",
    "max_output_tokens",
    "stream",
    "text",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    *SAMPLING,
)
IGNORED = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "include": ([], ["reasoning.encrypted_content"]),  # there is none: reasoning is in the open
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": None}, {"summary": None}, {"effort": None, "summary": None}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
TEXTS = ("input_text", "output_text", "text")
Json = dict[str, Any]


def chat_body(body: Json) -> Json:
    """Return the body of a chat that means the same. Raises BadRequest."""
    check_names(body, KNOWN, IGNORED, UNSUPPORTED)
    fields = Fields(body, chat=True)
    passed = ("model", "stream", "parallel_tool_calls", *SAMPLING)
    chat = {name: body[name] for name in passed if name in body}
    chat["max_completion_tokens"] = fields.integer("max_output_tokens", None, low=1)
    chat["messages"] = _messages(fields)
    chat["tools"] = [
        _tool(tool, f"tools[{i}]") for i, tool in enumerate(objects(body.get("tools"), "tools"))
    ]
    chat["tool_choice"] = _choice(fields.get("tool_choice", (str, dict)))
    chat["response_format"] = _format(fields.get("text", dict) or {})
    return chat


def _messages(fields: Fields) -> list[Json]:
    instructions = fields.get("instructions", str)
    messages = [{"role": "system", "content": instructions}] if instructions else []
    given = fields.get("input", (str, list))
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not given:
        raise BadRequest("input must be text or a list of at least one item", "input")
    for message in _items(objects(given, "input")):
        last = messages[-1] if messages else {}
        if message["role"] == "assistant" == last.get("role"):
            _join(last, message)
        else:
            messages.append(message)
    return messages


def _items(items: list[Json]) -> Iterator[Json]:
    """Yield a message for each item; those of one turn of the assistant belong together."""
    for index, item in enumerate(items):
        where = f"input[{index}]"
        match item.get("type", "message"):
            case "message":
                content = texts(item.get("content"), TEXTS, f"{where}.content")
                yield {"role": text_at(item, "role", where), "content": content}
            case "function_call":
                yield {"role": "assistant", "content": "", "tool_calls": [_call(item, where)]}
            case "function_call_output":
                call_id = text_at(item, "call_id", where)
                output = texts(item.get("output"), TEXTS, f"{where}.output")
                yield {"role": "tool", "tool_call_id": call_id, "content": output}
            case "reasoning":
                content = texts(item.get("content"), ("reasoning_text",), f"{where}.content")
                yield {"role": "assistant", "content": "", "reasoning_content": content}
            case _:
                raise unsupported_part(item, where)


def _call(item: Json, where: str) -> Json:
    names = {name: text_at(item, name, where) for name in ("name", "arguments")}
    return {"id": text_at(item, "call_id", where), "type": "function", "function": names}


def _join(message: Json, more: Json) -> None:
    """Add a further message of the same turn."""
    for name, value in more.items():
        if name != "role":
            message[name] = message[name] + value if name in message else value


def _tool(tool: Json, where: str) -> Json:
    if tool.get("type") != "function":
        raise unsupported_part(tool, where)
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool.get(name) for name in names}}


def _choice(choice: Any) -> Any:
    match choice:
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
    return choice


def _format(text: Json) -> Any:
    if unknown := {name for name, value in text.items() if value is not None} - {"format"}:
        raise BadRequest(f"text.{min(unknown)} is not supported here; leave it out", "text")
    form = Fields(text, chat=True).get("format", dict)
    if form is None or form.get("type") != "json_schema":
        return form
    inner = {name: v for name, v in form.items() if name != "type" and v is not None}
    return {"type": "json_schema", "json_schema": inner}
