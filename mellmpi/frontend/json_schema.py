"""Refuses JSON schemas with keywords that a grammar would not enforce."""

from collections.abc import Iterator
from typing import Any

from mellmpi.frontend.fields import BadRequest, shortened

MAX_DEPTH = 64
# What llguidance enforces (its docs/json_schema.md), by the kind of the keyword's value.
PLAIN = {
    "type",
    "enum",
    "const",
    "$ref",
    "minItems",
    "maxItems",
    "required",
    "minProperties",
    "maxProperties",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "multipleOf",
}
NUMBERS = {"exclusiveMinimum", "exclusiveMaximum"}  # true and false in draft 4
ONE_SCHEMA = {"items", "additionalProperties"}
LISTS = {"anyOf", "oneOf", "allOf", "prefixItems"}
NAMED = {"properties", "patternProperties", "$defs", "definitions"}
ANNOTATIONS = {  # of the specification, OpenAPI and pydantic; they restrict nothing
    "$schema",
    "$id",
    "$comment",
    "title",
    "description",
    "default",
    "examples",
    "example",
    "deprecated",
    "readOnly",
    "writeOnly",
    "discriminator",
}
HINTS = {
    "nullable": 'use "type": [..., "null"]',
    "additionalItems": "use prefixItems and items",
    "not": "describe what is allowed",
    "x-guidance": "it would change the meaning of the schema",
}


def check_schema(schema: Any, field: str) -> None:
    """Raises BadRequest with the place and the name of a keyword that is not supported."""
    _check(schema, field, "", 0)


def _check(schema: Any, field: str, path: str, depth: int) -> None:
    where = f"{field}: the schema" + (f" at {shortened(path)}" if path else "")
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise BadRequest(f"{where} must be an object, or true or false", field)
    if depth > MAX_DEPTH:
        raise BadRequest(f"{field}: the schema is nested more than {MAX_DEPTH} deep", field)
    for name, value in schema.items():
        known = PLAIN | NUMBERS | ONE_SCHEMA | LISTS | NAMED | ANNOTATIONS
        if name not in known and (not name.startswith("x-") or name in HINTS):
            hint = f"; {HINTS[name]}" if name in HINTS else ""
            raise BadRequest(
                f"{where} has {shortened(name)!r}, which is not supported{hint}", field
            )
        if name in NUMBERS and type(value) not in (int, float):
            raise BadRequest(f"{where}: {name} must be a number", field)
        for key, part in _parts(name, value, where, field):
            _check(part, field, f"{path}/{key}", depth + 1)


def _parts(name: str, value: Any, where: str, field: str) -> Iterator[tuple[str, Any]]:
    """Yield the schemas in the value of a keyword, with their places."""
    if name in ONE_SCHEMA:
        yield name, value
    elif name in LISTS:
        if not isinstance(value, list):
            raise BadRequest(f"{where}: {name} must be a list of schemas", field)
        yield from ((f"{name}/{index}", part) for index, part in enumerate(value))
    elif name in NAMED:
        if not isinstance(value, dict):
            raise BadRequest(f"{where}: {name} must be an object of schemas", field)
        yield from ((f"{name}/{key}", part) for key, part in value.items())
