"""The tools of a request: checked, and in the forms that templates need."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mellmpi.frontend.fields import BadRequest, Fields, shortened
from mellmpi.frontend.token_choice import clean

MAX_TOOLS = 512
NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Function:
    """A function that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]  # a JSON schema
    strict: bool  # arguments must fit the schema even where the model is free to call

    @property
    def definition(self) -> dict[str, Any]:
        """The function as chat templates expect it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Tools:
    """The functions that the answer to a request may call."""

    functions: tuple[Function, ...]  # at least one
    required: bool  # at least one call
    parallel: bool  # more than one call

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)

    @property
    def instructions(self) -> str:
        """Tells a model whose template knows no tools how to call them."""
        definitions = "\n".join(
            json.dumps(function.definition["function"], ensure_ascii=False)
            for function in self.functions
        )
        return (
            f"You can call these functions:\n{definitions}\n"
            "To call one, answer with nothing but a JSON object such as "
            '{"name": "the_function", "arguments": {"parameter": "value"}}.'
        )


def tools_of(fields: Fields) -> Tools | None:
    """Return the tools of a body, or None if the answer may call none. Raises BadRequest."""
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(_given(fields))]
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequest(f"tools has two functions named {shortened(twice)}", "tools")
    parallel = fields.boolean("parallel_tool_calls", True)
    choice = fields.get("tool_choice", (str, dict))
    if choice is None or choice == "auto":
        return Tools(tuple(functions), False, parallel) if functions else None
    if choice == "none":
        return None
    if choice == "required":
        chosen = functions
    else:
        name = _named(choice)
        chosen = [function for function in functions if function.name == name]
        parallel = False
    if not chosen:
        raise BadRequest("tool_choice asks for a function that tools does not have", "tool_choice")
    return Tools(tuple(chosen), True, parallel)


def _given(fields: Fields) -> list[Any]:
    tools = fields.get("tools", list) or []
    if len(tools) > MAX_TOOLS:
        raise BadRequest(f"tools may have at most {MAX_TOOLS} functions", "tools")
    return list(tools)


def _function(tool: Any, where: str) -> Function:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise BadRequest(f"{where}: only tools of type function are supported", where)
    given = tool.get("function")
    if not isinstance(given, dict):
        raise BadRequest(f"{where}.function must be an object", f"{where}.function")
    if unknown := given.keys() - {"name", "description", "parameters", "strict"}:
        name = shortened(min(unknown))
        raise BadRequest(f"{where}.function.{name} is not supported", f"{where}.function")
    function = Fields(given, chat=True)
    name = function.get("name", str)
    if name is None or not NAME.fullmatch(name):
        raise BadRequest(
            f"{where}.function.name must be 1 to 128 letters, digits, underscores, dots or dashes",
            f"{where}.function.name",
        )
    return Function(
        name=name,
        description=clean(function.get("description", str) or "", where),
        parameters=_schema(function.get("parameters", dict), where),
        strict=function.boolean("strict"),
    )


def _schema(schema: dict[str, Any] | None, where: str) -> dict[str, Any]:
    schema = schema or NO_PARAMETERS
    clean(json.dumps(schema, ensure_ascii=False), f"{where}.function.parameters")
    return schema


def _named(choice: Any) -> str:
    match choice:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    raise BadRequest(
        "tool_choice must be none, auto, required, or an object with the name of a function",
        "tool_choice",
    )
