"""JSON schemas of the bodies that the routes answer with: members that are always there."""

from mellmpi.frontend.dialects import CHAT, COMPLETIONS, COUNT_TOKENS, MESSAGES, RESPONSES
from mellmpi.frontend.http.schemas import (
    OBJECT,
    TEXT,
    TOKENS,
    Schema,
    either,
    integer,
    list_of,
    object_of,
    one_of,
)

NULL = one_of(None)
COUNT = integer(0)
ERROR = object_of(
    {
        "error": object_of(
            {
                "message": TEXT,
                "type": TEXT,
                "param": either(TEXT, NULL),
                "code": either(TEXT, NULL),
            }
        )
    }
)
MESSAGES_ERROR = object_of(
    {"type": one_of("error"), "error": object_of({"type": TEXT, "message": TEXT})}
)
USAGE = object_of({"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT})
MODEL = object_of(
    {
        "id": TEXT,
        "object": one_of("model"),
        "created": COUNT,
        "owned_by": TEXT,
        "max_model_len": either(integer(1), NULL),
    }
)
CALL = object_of(
    {
        "id": TEXT,
        "type": one_of("function"),
        "function": object_of({"name": TEXT, "arguments": TEXT}),
    }
)
MESSAGE = object_of(
    {"role": one_of("assistant"), "content": either(TEXT, NULL), "refusal": NULL},
    {"reasoning_content": TEXT, "tool_calls": list_of(CALL, least=1)},
)


def _answer(kind: str, choice: Schema, reasons: Schema) -> Schema:
    logprobs = either(OBJECT, NULL)
    choice = {"index": COUNT, **choice, "logprobs": logprobs, "finish_reason": reasons}
    return object_of(
        {
            "id": TEXT,
            "object": one_of(kind),
            "created": COUNT,
            "model": TEXT,
            "choices": list_of(object_of(choice), least=1),
            "usage": USAGE,
        }
    )


STATE = object_of({"state": TEXT, "reason": TEXT})
FILE = object_of(
    {"id": TEXT, "object": one_of("file"), "bytes": COUNT, "created_at": COUNT, "purpose": TEXT}
)
BATCH = object_of(
    {
        "id": TEXT,
        "object": one_of("batch"),
        "endpoint": TEXT,
        "input_file_id": TEXT,
        "status": TEXT,
        "created_at": COUNT,
        "request_counts": object_of({"total": COUNT, "completed": COUNT, "failed": COUNT}),
    }
)


def list_of_all(item: Schema) -> Schema:
    """Return the schema of a page of these objects."""
    return object_of({"object": one_of("list"), "data": list_of(item)})


ANSWERS: dict[str, Schema] = {  # path -> schema of its answer with status 200
    CHAT: _answer("chat.completion", {"message": MESSAGE}, one_of("stop", "length", "tool_calls")),
    COMPLETIONS: _answer("text_completion", {"text": TEXT}, one_of("stop", "length")),
    RESPONSES: object_of(
        {
            "id": TEXT,
            "object": one_of("response"),
            "created_at": COUNT,
            "status": one_of("completed", "incomplete"),
            "model": TEXT,
            "output": list_of(object_of({"id": TEXT, "type": TEXT, "status": TEXT})),
            "usage": object_of(
                {"input_tokens": COUNT, "output_tokens": COUNT, "total_tokens": COUNT}
            ),
        }
    ),
    MESSAGES: object_of(
        {
            "id": TEXT,
            "type": one_of("message"),
            "role": one_of("assistant"),
            "model": TEXT,
            "content": list_of(object_of({"type": one_of("text", "thinking", "tool_use")})),
            "stop_reason": one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
            "usage": object_of({"input_tokens": COUNT, "output_tokens": COUNT}),
        }
    ),
    COUNT_TOKENS: object_of({"input_tokens": COUNT}),
    "/v1/models": object_of({"object": one_of("list"), "data": list_of(MODEL)}),
    "/v1/models/{name}": MODEL,
    "/tokenize": object_of({"count": COUNT, "max_model_len": integer(1), "tokens": TOKENS}),
    "/detokenize": object_of({"prompt": TEXT}),
    "/tokenizer_info": object_of({"chat_template": TEXT}),
    "/v1/files": either(FILE, list_of_all(FILE)),
    "/v1/files/{file_id}": either(FILE, object_of({"id": TEXT, "deleted": one_of(True)})),
    "/v1/batches": either(BATCH, list_of_all(BATCH)),
    "/v1/batches/{batch_id}": BATCH,
    "/v1/batches/{batch_id}/cancel": BATCH,
    "/live": object_of({"silent_s": {"type": "number", "minimum": 0}}),
    "/ready": STATE,
    "/health": STATE,
    "/version": object_of({"version": TEXT}),
    "/load": object_of({"server_load": COUNT}),
    "/v1/cluster": OBJECT,
    "/v1/cluster/workers/{worker}/drain": OBJECT,
    "/v1/cluster/workers/{worker}/undrain": OBJECT,
    "/v1/cluster/requests/{request_id}/migrate": OBJECT,
    "/v1/cluster/loglevel": OBJECT,
}
ANSWERS[RESPONSES + "/{response_id}"] = ANSWERS[RESPONSES]
EVENT = {  # of a stream: its `data` is JSON, or [DONE] at the end
    "type": "object",
    "properties": {"data": TEXT, "event": TEXT, "id": TEXT},
    "required": ["data"],
}
EVENT_STREAM = ("text/event-stream", EVENT)
OTHER_ANSWERS = {  # path -> media type and schema of an answer that is no JSON
    CHAT: EVENT_STREAM,
    COMPLETIONS: EVENT_STREAM,
    RESPONSES: EVENT_STREAM,
    RESPONSES + "/{response_id}": EVENT_STREAM,
    MESSAGES: EVENT_STREAM,
    "/v1/streams/{call_id}": EVENT_STREAM,
    "/v1/cluster/events": EVENT_STREAM,
    "/metrics": ("text/plain", TEXT),
    "/v1/files/{file_id}/content": ("application/jsonl", TEXT),
    "/": ("text/html", TEXT),
}
