"""The OpenAPI document: which bodies the routes take, and what they answer."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from mellmpi.frontend.dialects import MESSAGES, RESPONSES
from mellmpi.frontend.http.access import PUBLIC, ROUTES
from mellmpi.frontend.http.answer_schemas import ANSWERS, ERROR, MESSAGES_ERROR, OTHER_ANSWERS
from mellmpi.frontend.http.schemas import BODIES, TEXT, Schema, integer

STATES = ("/live", "/ready", "/health")  # answer the same with 503
ERRORS = {  # status -> what it means. 4XX: 405, 413
    "400": "The request is not valid",
    "401": "A key is needed",
    "403": "The key does not have the scope of this route",
    "404": "There is no such model, stream, worker or request",
    "409": "Not in the present state",
    "429": "Too many requests; see Retry-After",
    "4XX": "Another error of the client",
    "503": "Not ready, or overloaded; see Retry-After",
}
KEYS = {"bearer": {"type": "http", "scheme": "bearer"}}
PARAMETERS: dict[str, list[dict[str, Any]]] = {  # beside those in paths
    RESPONSES + "/{response_id}": [
        {"name": "stream", "in": "query", "schema": {"enum": ["true", "false", "True", "False"]}},
        {"name": "starting_after", "in": "query", "schema": integer(0, 10**9 - 1)},
    ],
    "/v1/streams/{call_id}": [
        {"name": "last-event-id", "in": "header", "schema": {**TEXT, "pattern": "^[0-9,]+$"}}
    ],
}


def add_document(app: FastAPI) -> None:
    """Let an application describe its routes."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    _describe(path, method, operation)
            document["components"] = {"securitySchemes": KEYS}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's manual has it


def _describe(path: str, method: str, operation: dict[str, Any]) -> None:
    """Add bodies and answers to one operation."""
    if path in BODIES and method == "post":
        content = {"application/json": {"schema": BODIES[path]}}
        operation["requestBody"] = {"required": True, "content": content}
    error = MESSAGES_ERROR if path.startswith(MESSAGES) else ERROR
    responses = {status: _response(text, error) for status, text in ERRORS.items()}
    content = {"application/json": {"schema": ANSWERS[path]}} if path in ANSWERS else {}
    if path in OTHER_ANSWERS:
        media_type, schema = OTHER_ANSWERS[path]
        content[media_type] = {"schema": schema}
    responses["200"] = {"description": "OK", "content": content}
    if path in STATES:
        responses["503"] = {**responses["200"], "description": "Not now; the body says why"}
    operation["responses"] = responses
    if more := PARAMETERS.get(path):
        operation["parameters"] = [*operation.get("parameters", ()), *more]
    if ROUTES.get(path) != PUBLIC:
        operation["security"] = [{"bearer": []}, {}]  # a server without keys needs none


def _response(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
