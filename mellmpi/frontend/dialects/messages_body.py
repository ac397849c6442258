"""Translates bodies of Anthropic's Messages into bodies of chats."""

import json
from collections.abc import Iterator
from typing import Any

from mellmpi.frontend.dialects.translation import (
    SAMPLING,
    objects,
    text_at,
    texts,
    unsupported_part,
)
from mellmpi.frontend.fields import BadRequest, Fields, check_names, shortened
from mellmpi.frontend.served import ServedModels

KNOWN = (
    "model",
    "messages",
    "system",
    "max_tokens",
    "stop_sequences",
    "stream",
    "tools",
    "tool_choice",
    "thinking",
    "output_config",
    *SAMPLING,
)
IGNORED = ("metadata", "service_tier")
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "output_format": (),
    "speed": ("standard",),
}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
Json = dict[str, Any]


def chat_body(body: Json, served: ServedModels) -> Json:
    """Return the body of a chat that means the same. Raises BadRequest."""
    check_names(body, KNOWN, IGNORED, UNSUPPORTED)
    fields = Fields(body, chat=True)
    max_tokens = fields.integer("max_tokens", None, low=1)
    if max_tokens is None:
        raise BadRequest("max_tokens is required", "max_tokens")
    chat = {name: body[name] for name in ("model", "stream", *SAMPLING) if name in body}
    chat |= {"max_tokens": max_tokens, "stop": fields.get("stop_sequences", list)}
    chat["messages"] = [*_system(body.get("system")), *_messages(fields)]
    chat["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(_tools(body))]
    return chat | _choice(fields) | _output_config(fields) | _thinking(fields, served)


def _system(system: Any) -> list[Json]:
    text = texts(system, ("text",), "system")
    return [{"role": "system", "content": text}] if text else []


def _messages(fields: Fields) -> Iterator[Json]:
    given = objects(fields.get("messages", list), "messages")
    if not given:
        raise BadRequest("messages must be a list of at least one message", "messages")
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        match message.get("role"):
            case "user":
                yield from _user(message.get("content"), f"{where}.content")
            case "assistant":
                yield _assistant(message.get("content"), f"{where}.content")
            case _:
                raise BadRequest(f"{where}.role must be user or assistant", f"{where}.role")
    if given[-1]["role"] == "assistant":
        raise BadRequest(
            "a last message of the assistant, which the answer continues, is not supported",
            "messages",
            "unsupported",
        )


def _user(content: Any, where: str) -> Iterator[Json]:
    """Yield the results of tools, then the text of the user."""
    if isinstance(content, str):
        yield {"role": "user", "content": content}
        return
    said = []
    for index, block in enumerate(_blocks(content, where)):
        at = f"{where}[{index}]"
        if block.get("type") == "tool_result":
            result = texts(block.get("content"), ("text",), f"{at}.content")
            call_id = text_at(block, "tool_use_id", at)
            yield {"role": "tool", "tool_call_id": call_id, "content": result}
        elif block.get("type") == "text":
            said.append(text_at(block, "text", at))
        else:
            raise unsupported_part(block, at)
    if said:
        yield {"role": "user", "content": "\n".join(said)}


def _assistant(content: Any, where: str) -> Json:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    said, thought, calls = [], [], []
    for index, block in enumerate(_blocks(content, where)):
        at = f"{where}[{index}]"
        match block.get("type"):
            case "text":
                said.append(text_at(block, "text", at))
            case "thinking":
                thought.append(text_at(block, "thinking", at))
            case "redacted_thinking":
                pass
            case "tool_use":
                calls.append(_tool_use(block, at))
            case _:
                raise unsupported_part(block, at)
    message: Json = {"role": "assistant", "content": "".join(said)}
    if thought:
        message["reasoning_content"] = "".join(thought)
    return message | {"tool_calls": calls} if calls else message


def _blocks(content: Any, where: str) -> list[Json]:
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be text or a list of content blocks", where)
    return objects(content, where)


def _tool_use(block: Json, where: str) -> Json:
    if not isinstance(block.get("input"), dict):
        raise BadRequest(f"{where}.input must be an object", f"{where}.input")
    arguments = json.dumps(block["input"], ensure_ascii=False)
    function = {"name": text_at(block, "name", where), "arguments": arguments}
    return {"id": text_at(block, "id", where), "type": "function", "function": function}


# --- tools and the form of the answer ------------------------------------------------------------


def _tools(body: Json) -> list[Json]:
    return objects(body.get("tools"), "tools")


def _tool(tool: Json, where: str) -> Json:
    if tool.get("type") not in (None, "custom"):
        raise unsupported_part(tool, where)
    if not isinstance(tool.get("input_schema"), dict):
        raise BadRequest(f"{where}.input_schema must be an object", f"{where}.input_schema")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool["input_schema"],
        "strict": tool.get("strict"),
    }
    return {"type": "function", "function": function}


def _choice(fields: Fields) -> Json:
    choice = fields.get("tool_choice", dict)
    if choice is None:
        return {}
    parallel = not Fields(choice, chat=True).boolean("disable_parallel_tool_use")
    chosen: Any = CHOICES.get(str(choice.get("type")))
    if choice.get("type") == "tool":
        name = text_at(choice, "name", "tool_choice")
        chosen = {"type": "function", "function": {"name": name}}
    if chosen is None:
        raise BadRequest("tool_choice.type must be auto, any, tool or none", "tool_choice")
    return {"tool_choice": chosen, "parallel_tool_calls": parallel}


def _output_config(fields: Fields) -> Json:
    config = fields.get("output_config", dict) or {}
    if unknown := {name for name, value in config.items() if value is not None} - {"format"}:
        name = f"output_config.{shortened(min(unknown))}"
        raise BadRequest(f"{name} is not supported here; leave it out", name, "unsupported")
    match config.get("format"):
        case None:
            return {}
        case {"type": "json_schema", "schema": dict(schema)}:
            named = {"name": "output", "schema": schema}
            return {"response_format": {"type": "json_schema", "json_schema": named}}
    raise BadRequest("output_config.format must be a json_schema with a schema", "output_config")


def _thinking(fields: Fields, served: ServedModels) -> Json:
    """Models that can be told whether to think have a switch in their template."""
    thinking = fields.get("thinking", dict)
    if thinking is None or thinking.get("type") == "adaptive":
        return {}
    if thinking.get("type") not in ("enabled", "disabled"):
        raise BadRequest("thinking.type must be enabled, disabled or adaptive", "thinking")
    enabled = thinking["type"] == "enabled"
    model = served.named(fields.get("model", str))
    if "enable_thinking" not in served.tokenizers[model.name].template:
        if not enabled:
            return {}
        message = "this model cannot be told to think; leave thinking out"
        raise BadRequest(message, "thinking", "unsupported")
    variables = fields.get("chat_template_kwargs", dict) or {}
    return {"chat_template_kwargs": {"enable_thinking": enabled, **variables}}
