"""Reads JSON of clients: what is not valid, or has two meanings, is refused."""

import json
from typing import Any, NoReturn

from mellmpi.frontend.fields import BadRequest

MAX_DEPTH = 100  # of nesting; far below what Python's own functions can write again


def json_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object (RFC 8259) of a body. Raises BadRequest.

    Refused: text that is not UTF-8, nesting beyond MAX_DEPTH, names that occur twice, NaN,
    Infinity and numbers beyond the range of a double.
    """
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=_object,
            parse_constant=_no_number,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        raise BadRequest(f"not UTF-8 text ({error.reason})", code="invalid_json") from error
    except RecursionError as error:
        raise BadRequest("the JSON is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise BadRequest(f"not valid JSON ({error})", code="invalid_json") from error
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    if _too_deep(value):
        raise BadRequest("the JSON is nested too deeply", code="invalid_json")
    return value


def _too_deep(value: dict[str, Any]) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = [part.values() if isinstance(part, dict) else part for part in level]
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice[:40]!r} occurs twice in an object")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return value
