"""JSON schemas (draft 2020-12) of the bodies that the routes take.

A body that a schema forbids is refused. The reverse does not hold: what depends on the model, or on
several fields at once, is checked by the server alone.
"""

from collections.abc import Mapping
from typing import Any

from mellmpi.frontend.dialects import (
    CHAT,
    COMPLETIONS,
    COUNT_TOKENS,
    FIELDS,
    MESSAGES,
    RESPONSES,
)
from mellmpi.frontend.openai import LIMIT, MAX_CHOICES
from mellmpi.frontend.prompt_options import MAX_LOGPROBS
from mellmpi.frontend.token_choice import MAX_NAMED, MAX_STOPS
from mellmpi.frontend.tools import MAX_TOOLS, NAME

Schema = dict[str, Any]

ANY: Schema = {}
TEXT: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
NULL: Schema = {"type": "null"}


def one_of(*values: Any) -> Schema:
    """Return the schema of these values."""
    return {"enum": list(values)}


def either(*schemas: Schema) -> Schema:
    """Return the schema of what one of these allows."""
    return {"anyOf": list(schemas)}


def integer(low: int | None = None, high: int | None = None) -> Schema:
    """Return the schema of an integer within these bounds."""
    bounds = {"minimum": low, "maximum": high}
    return {"type": "integer"} | {name: v for name, v in bounds.items() if v is not None}


def list_of(item: Schema, least: int = 0, most: int | None = None) -> Schema:
    """Return the schema of a list with so many items."""
    bounds = {"minItems": least} | ({} if most is None else {"maxItems": most})
    return {"type": "array", "items": item, **bounds}


def object_of(
    required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None
) -> Schema:
    """Return the schema of an object with these members, and any others. Optional ones may be
    null."""
    named = {name: either(schema, NULL) for name, schema in (optional or {}).items()}
    found = {"type": "object", "properties": {**required, **named}}
    return found | ({"required": list(required)} if required else {})


# --- parts ---------------------------------------------------------------------------------------

TOKENS = list_of(integer(0))
STOPS = list_of({"type": "string", "minLength": 1}, most=MAX_STOPS)
PART = object_of({"type": one_of("text"), "text": TEXT})
PARTS = either(TEXT, list_of(PART))
CALL = object_of({"id": TEXT, "function": object_of({"name": TEXT, "arguments": TEXT})})
CHAT_MESSAGE = either(
    object_of({"role": TEXT, "content": PARTS}, {"tool_calls": list_of(CALL)}),
    object_of({"role": TEXT, "tool_calls": list_of(CALL, least=1)}, {"content": PARTS}),
)
ITEM = either(  # of the input of Responses
    object_of(
        {"role": TEXT}, {"type": one_of("message"), "content": either(TEXT, list_of(OBJECT))}
    ),
    object_of({"type": one_of("function_call"), "call_id": TEXT, "name": TEXT, "arguments": TEXT}),
    object_of({"type": one_of("function_call_output"), "call_id": TEXT}),
    object_of({"type": one_of("reasoning")}),
)
BLOCK = object_of(  # of a message of Messages
    {"type": one_of("text", "thinking", "redacted_thinking", "tool_use", "tool_result")}
)
FUNCTION_NAME = {"type": "string", "pattern": f"^{NAME.pattern}$"}
FUNCTION: Schema = {
    **object_of(
        {"name": FUNCTION_NAME}, {"description": TEXT, "parameters": OBJECT, "strict": BOOLEAN}
    ),
    "additionalProperties": False,
}
TOOL = object_of({"type": one_of("function"), "function": FUNCTION})
TOOL_CHOICE = either(
    one_of("none", "auto", "required"),
    object_of({"type": one_of("function"), "function": object_of({"name": TEXT})}),
)
FORMAT = object_of({"type": one_of("text", "json_object", "json_schema")})
CHOICE = list_of({"type": "string", "minLength": 1}, least=1)
GUIDED = {"json": either(TEXT, OBJECT), "regex": TEXT, "choice": CHOICE, "grammar": TEXT}
STRUCTURED: Schema = {
    **object_of({}, {**GUIDED, "json_object": BOOLEAN}),
    "additionalProperties": NULL,
}

# --- fields --------------------------------------------------------------------------------------

SAMPLING: dict[str, Schema] = {  # fields of all dialects
    "temperature": {"type": "number", "minimum": 0},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": integer(-1),
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "seed": integer(-(2**63), 2**64 - 1),
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "stop_token_ids": TOKENS,
    "ignore_eos": BOOLEAN,
    "min_tokens": integer(0),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": MAX_NAMED,
    },
    "allowed_token_ids": list_of(integer(0), least=1),
    "chat_template_kwargs": OBJECT,
}
SHARED: dict[str, Schema] = {
    "model": TEXT,
    "n": integer(1, MAX_CHOICES),
    "stop": either({"type": "string", "minLength": 1}, STOPS),
    "prompt_logprobs": integer(0, MAX_LOGPROBS),
    "stream": BOOLEAN,
    "stream_options": object_of({}, {"include_usage": BOOLEAN}),
    "return_token_ids": BOOLEAN,
    "priority": integer(-LIMIT, LIMIT),
    "deadline_s": {"type": "number", "minimum": 0},
    "response_format": FORMAT,
    "structured_outputs": STRUCTURED,
    **{f"guided_{kind}": schema for kind, schema in GUIDED.items()},
    **{name: schema for name, schema in SAMPLING.items() if name != "chat_template_kwargs"},
}
SCHEMAS: dict[str, dict[str, Schema]] = {  # path -> field -> its schema
    CHAT: {
        **SHARED,
        "messages": list_of(CHAT_MESSAGE, least=1),
        "max_tokens": integer(1),
        "max_completion_tokens": integer(1),
        "logprobs": BOOLEAN,
        "top_logprobs": integer(0, MAX_LOGPROBS),
        "add_generation_prompt": BOOLEAN,
        "chat_template_kwargs": OBJECT,
        "tools": list_of(TOOL, most=MAX_TOOLS),
        "tool_choice": TOOL_CHOICE,
        "parallel_tool_calls": BOOLEAN,
    },
    COMPLETIONS: {
        **SHARED,
        "prompt": either(
            TEXT,
            list_of(integer(0), least=1),
            list_of(either(TEXT, list_of(integer(0), least=1)), least=1),
        ),
        "max_tokens": integer(0),
        "logprobs": integer(0, MAX_LOGPROBS),
        "echo": BOOLEAN,
    },
    RESPONSES: {
        **SAMPLING,
        "model": TEXT,
        "input": either(TEXT, list_of(ITEM, least=1)),
        "instructions": TEXT,
        "max_output_tokens": integer(1),
        "stream": BOOLEAN,
        "text": object_of({}, {"format": FORMAT}),
        "tools": list_of(
            object_of({"type": one_of("function"), "name": FUNCTION_NAME}), most=MAX_TOOLS
        ),
        "tool_choice": either(one_of("none", "auto", "required"), OBJECT),
        "parallel_tool_calls": BOOLEAN,
    },
    MESSAGES: {
        **SAMPLING,
        "model": TEXT,
        "messages": list_of(
            object_of(
                {"role": one_of("user", "assistant"), "content": either(TEXT, list_of(BLOCK))}
            ),
            least=1,
        ),
        "system": PARTS,
        "max_tokens": integer(1),
        "stop_sequences": STOPS,
        "stream": BOOLEAN,
        "tools": list_of(
            object_of({"name": FUNCTION_NAME, "input_schema": OBJECT}), most=MAX_TOOLS
        ),
        "tool_choice": object_of({"type": one_of("auto", "any", "tool", "none")}),
        "thinking": object_of({"type": one_of("enabled", "disabled", "adaptive")}),
        "output_config": object_of({}, {"format": object_of({"type": one_of("json_schema")})}),
    },
}
REQUIRED = {
    CHAT: ("messages",),
    COMPLETIONS: ("prompt",),
    RESPONSES: ("input",),
    MESSAGES: ("messages", "max_tokens"),
}


def body_schema(path: str) -> Schema:
    """Return the schema of the bodies of a dialect."""
    ignored, unsupported = FIELDS[path].ignored, FIELDS[path].unsupported
    required = {name: SCHEMAS[path][name] for name in REQUIRED[path]}
    optional = {
        **dict.fromkeys(ignored, ANY),
        **{name: one_of(*values) for name, values in unsupported.items() if values},
        **{name: schema for name, schema in SCHEMAS[path].items() if name not in required},
    }
    # Names that are not known, and unsupported ones, may be null.
    return {**object_of(required, optional), "additionalProperties": NULL}


def _without_answer(schema: Schema) -> Schema:
    """Return the schema of a body whose prompt alone counts: `max_tokens` is ignored."""
    required = [name for name in schema["required"] if name != "max_tokens"]
    return {
        **schema,
        "properties": {**schema["properties"], "max_tokens": ANY},
        "required": required,
    }


BODIES: dict[str, Schema] = {  # path -> schema of the bodies of its POST
    **{path: body_schema(path) for path in SCHEMAS},
    COUNT_TOKENS: _without_answer(body_schema(MESSAGES)),
    "/tokenize": either(*(_without_answer(body_schema(p)) for p in (COMPLETIONS, CHAT))),
    "/detokenize": object_of({"tokens": TOKENS}, {"model": TEXT}),
    "/v1/cluster/requests/{request_id}/migrate": object_of({"worker": integer(1)}),
    "/v1/cluster/loglevel": object_of({}, {"level": TEXT}),
    "/v1/batches": object_of(
        {"input_file_id": TEXT, "endpoint": one_of(CHAT, COMPLETIONS), "completion_window": TEXT},
        {"metadata": either(OBJECT, NULL)},
    ),
}
