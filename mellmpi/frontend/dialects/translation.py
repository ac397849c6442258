"""Checks of parts of bodies that are translated into the body of a chat."""

import re
from collections.abc import Mapping
from typing import Any

from mellmpi.frontend.fields import BadRequest, shortened

Json = dict[str, Any]

SAMPLING = (  # fields with the same name and meaning in all dialects; beyond the APIs: as in vLLM
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
    "chat_template_kwargs",
)


def objects(value: Any, where: str) -> list[Json]:
    """Return a list of objects. Raises BadRequest; None: an empty list."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise BadRequest(f"{where} must be a list of objects", where)
    return value


def text_at(part: Json, name: str, where: str) -> str:
    """Return the text in this field of an object. Raises BadRequest."""
    value = part.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"{where}.{name} must be text", f"{where}.{name}")
    return value


def texts(value: Any, kinds: tuple[str, ...], where: str) -> str:
    """Return the joined texts of a content: a text, or parts of these types. Raises BadRequest."""
    if isinstance(value, str):
        return value
    joined = []
    for index, part in enumerate(objects(value, where)):
        if part.get("type") not in kinds:
            raise unsupported_part(part, f"{where}[{index}]")
        joined.append(text_at(part, "text", f"{where}[{index}]"))
    return "".join(joined)


def unsupported_part(part: Json, where: str) -> BadRequest:
    """Return the error for a part of a type that is not supported."""
    kind = shortened(repr(part.get("type")))
    return BadRequest(f"{where}: the type {kind} is not supported here", where, "unsupported")


def renamed(error: BadRequest, names: Mapping[str, str]) -> BadRequest:
    """Return an error about fields of a chat in the words of the body that was translated."""
    message, param = error.message, error.param
    for name, ours in names.items():
        message = re.sub(rf"\b{name}\b", ours, message)
        param = ours if param == name else param
    return BadRequest(message, param, error.code, error.status, error.headers)
