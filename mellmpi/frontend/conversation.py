"""The messages of a chat: checked, and as chat templates expect them."""

import json
from typing import Any

from mellmpi.frontend.fields import BadRequest, Fields
from mellmpi.frontend.strict_json import json_object
from mellmpi.frontend.token_choice import clean
from mellmpi.frontend.tokenizer import Message
from mellmpi.frontend.tool_formats import tool_format
from mellmpi.frontend.tools import Tools


def conversation(fields: Fields, tools: Tools | None, template: str) -> list[Message]:
    """Return the messages of a body for a template. Raises BadRequest.

    A template that knows no tools gets them as text: their definitions in a system message, calls
    and results as JSON.
    """
    given = fields.get("messages", list)
    if not given:
        raise BadRequest("messages must be a list of at least one message", "messages")
    names: dict[str, str] = {}  # of the functions that were called, by the id of the call
    messages = [_message(message, f"messages[{i}]", names) for i, message in enumerate(given)]
    for message in messages:
        if message["role"] == "developer" and "developer" not in template:
            message["role"] = "system"
    if tool_format(template).in_template:
        return messages
    messages = [_without_tools(message) for message in messages]
    return messages if tools is None else _instructed(messages, tools.instructions)


def _message(message: Any, where: str, names: dict[str, str]) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest(f"{where} must be an object with a role", where)
    if message.get("function_call"):
        raise BadRequest(f"{where}.function_call is not supported; use tool_calls", where)
    checked = {**message, "role": clean(message["role"], where)}
    calls = _tool_calls(checked.pop("tool_calls", None), f"{where}.tool_calls")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise BadRequest(f"{where}.content must be text", f"{where}.content")
    checked["content"] = clean(content, where)
    if calls:
        checked["tool_calls"] = calls
        names.update((call["id"], call["function"]["name"]) for call in calls)
    if checked["role"] == "tool":
        call_id = message.get("tool_call_id")
        if not isinstance(call_id, str):
            raise BadRequest(f"{where}.tool_call_id must be text", f"{where}.tool_call_id")
        checked.setdefault("name", names.get(call_id, ""))
    return checked


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise BadRequest(f"{where}: only parts of type text are supported", f"{where}.content")


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise BadRequest(f"{where} must be a list", where)
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    match call:
        case {"id": str(call_id), "function": {"name": str(name), "arguments": str(arguments)}}:
            for text in (call_id, name, arguments):
                clean(text, where)
            function = {"name": name, "arguments": _object_or_text(arguments)}
            return {"id": call_id, "type": "function", "function": function}
    raise BadRequest(
        f"{where} must be an object with an id, and a function with name and arguments, all text",
        where,
    )


def _object_or_text(arguments: str) -> Any:
    """Templates write objects as JSON. What a model has broken off stays as it is."""
    try:
        return json_object(arguments.encode() or b"{}")
    except BadRequest:
        return arguments


# --- for templates that know no tools ------------------------------------------------------------


def _without_tools(message: Message) -> Message:
    calls = [
        json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())
    ]
    if calls:
        content = "\n".join([message["content"], *calls] if message["content"] else calls)
        return {"role": message["role"], "content": content}
    if message["role"] == "tool":
        result = {"name": message["name"], "result": message["content"]}
        return {"role": "user", "content": json.dumps(result, ensure_ascii=False)}
    return message


def _instructed(messages: list[Message], instructions: str) -> list[Message]:
    """Put instructions into the system message."""
    first, *others = messages
    if first["role"] == "system":
        return [{**first, "content": f"{first['content']}\n\n{instructions}"}, *others]
    return [{"role": "system", "content": instructions}, *messages]
