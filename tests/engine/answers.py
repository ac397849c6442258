"""A check of JSON values against JSON schemas, written from the specification for its tests."""

import re
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "number": (int, float),
    "integer": (int,),
}


def fits(value: Any, schema: dict[str, Any] | bool, root: dict[str, Any] | None = None) -> bool:
    """Whether `value` is valid under `schema` (JSON Schema 2020-12, the keywords of the tests)."""
    if isinstance(schema, bool):
        return schema
    root = schema if root is None else root
    return all(_fits(value, name, rule, schema, root) for name, rule in schema.items())


def _fits(value: Any, name: str, rule: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    match name:
        case "type":
            kinds = [rule] if isinstance(rule, str) else rule
            return any(_has_type(value, kind) for kind in kinds)
        case "enum":
            return any(_equal(value, item) for item in rule)
        case "const":
            return _equal(value, rule)
        case "anyOf":
            return any(fits(value, part, root) for part in rule)
        case "oneOf":
            return sum(fits(value, part, root) for part in rule) == 1
        case "allOf":
            return all(fits(value, part, root) for part in rule)
        case "$ref":
            found: Any = root
            for part in rule.removeprefix("#").split("/")[1:]:
                found = found[part]
            return fits(value, found, root)
        case "minimum":
            return not is_number or value >= rule
        case "maximum":
            return not is_number or value <= rule
        case "exclusiveMinimum":
            return not is_number or value > rule
        case "exclusiveMaximum":
            return not is_number or value < rule
        case "multipleOf":
            return not is_number or value % rule == 0
        case "minLength":
            return not isinstance(value, str) or len(value) >= rule
        case "maxLength":
            return not isinstance(value, str) or len(value) <= rule
        case "pattern":
            return not isinstance(value, str) or re.search(rule, value) is not None
        case "minItems":
            return not isinstance(value, list) or len(value) >= rule
        case "maxItems":
            return not isinstance(value, list) or len(value) <= rule
        case "prefixItems":
            pairs = zip(value, rule, strict=False) if isinstance(value, list) else ()
            return all(fits(item, part, root) for item, part in pairs)
        case "items":
            rest = value[len(schema.get("prefixItems", ())) :] if isinstance(value, list) else ()
            return all(fits(item, rule, root) for item in rest)
        case "required":
            return not isinstance(value, dict) or all(key in value for key in rule)
        case "properties":
            known = rule.items() if isinstance(value, dict) else ()
            return all(fits(value[key], part, root) for key, part in known if key in value)
        case "additionalProperties":
            keys = value.keys() - schema.get("properties", {}).keys() if value else ()
            return not isinstance(value, dict) or all(fits(value[k], rule, root) for k in keys)
        case "$defs":
            return True
    raise NotImplementedError(name)


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, TYPES[kind])


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b
