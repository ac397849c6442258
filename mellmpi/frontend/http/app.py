"""The routes of the API server."""

import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from mellmpi import __version__
from mellmpi.frontend.dialects import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    NEW,
    RESPONSES,
    dialect_of,
)
from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.http.access import methods_of
from mellmpi.frontend.http.batches import add_batches
from mellmpi.frontend.http.body import read_body
from mellmpi.frontend.http.calls import LiveCall
from mellmpi.frontend.http.cluster import add_cluster
from mellmpi.frontend.http.document import add_document
from mellmpi.frontend.http.link import SILENT_S, Link
from mellmpi.frontend.http.responses import CallResponse
from mellmpi.frontend.http.tokens import add_token_routes
from mellmpi.telemetry.prometheus import render

MAX_ID = 128  # characters of a stream's id
BOOLEANS = ("true", "false", "True", "False")  # in a query


def make_app(link: Link) -> FastAPI:
    """Return the application; all its routes answer through this link."""
    app = FastAPIOffline(title="mellmpi", version=__version__, redoc_url=None)
    app.add_exception_handler(BadRequest, bad_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _wrong_parameter)
    app.add_exception_handler(Exception, _internal_error)
    _add_state(app, link)
    _add_generation(app, Generation(link))
    add_token_routes(app, link)
    add_cluster(app, link)
    add_batches(app, link)
    add_document(app)
    return app


class ErrorResponse(JSONResponse):
    """Errors quote the client's text, in which lone surrogates may be: JSON escapes them."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


async def bad_request(request: Request, error: Any) -> Response:
    """Return the response for a `BadRequest`, in the dialect of its path."""
    body = dialect_of(request.url.path).error_body(error)
    return ErrorResponse(body, error.status, dict(error.headers))


async def _wrong_parameter(request: Request, error: Any) -> Response:
    place, problem = error.errors()[0]["loc"], error.errors()[0]["msg"]
    name = str(place[-1])
    return await bad_request(request, BadRequest(f"{name}: {problem}", name))


async def _http_error(request: Request, error: Any) -> Response:
    headers = {name.lower(): value for name, value in (error.headers or {}).items()}
    if error.status_code == 405:  # Starlette names the methods of one route of the path
        headers["allow"] = methods_of(request)
    problem = BadRequest(error.detail, status=error.status_code, headers=tuple(headers.items()))
    return await bad_request(request, problem)


async def _internal_error(request: Request, _: Exception) -> Response:
    # The server logs the error with its traceback, and the client's own words may be in it.
    text = f"an internal error; the server's log has it under {request.state.visit.id.decode()}"
    return await bad_request(request, BadRequest(text, code="internal_error", status=500))


# --- generation ----------------------------------------------------------------------------------


class Generation:
    """Opens calls and continues them."""

    def __init__(self, link: Link):
        self._link = link

    async def create(self, url: str, request: Request) -> Any:
        """Answer a body of this URL."""
        body = await read_body(request)
        if self._link.state.state == "draining":
            raise BadRequest("this server is shutting down", code="draining", status=503)
        call_id = uuid.uuid4().hex
        visit = request.state.visit
        live = await self._link.open(url, body, call_id, visit.owner, now=time.time())
        visit.call = live
        return self._response(live, None, live.opened.stream)

    async def resume(self, call_id: str, request: Request) -> Any:
        """Continue a stream after the event with the id that the request names."""
        live = await self._attached(call_id, request)
        last_event_id = request.headers.get("last-event-id")
        return self._response(live, positions(last_event_id, len(live.outputs)), True)

    async def retrieve(self, call_id: str, request: Request) -> Any:
        """Return a response of /v1/responses: a stream after this event, or a body once it ends."""
        live = await self._attached(call_id, request)
        if live.opened.url != RESPONSES:
            raise unknown_stream(call_id)
        query = request.query_params
        at = positions(query.get("starting_after"), 1, "starting_after")
        stream = query.get("stream", "false")
        if stream not in BOOLEANS:
            raise BadRequest("stream must be true or false", "stream")
        return self._response(live, at, stream.lower() == "true")

    async def _attached(self, call_id: str, request: Request) -> LiveCall:
        visit, live = request.state.visit, None
        if len(call_id) <= MAX_ID:
            live = await self._link.attach(re.split("[-_]", call_id)[-1], visit.owner)
        if live is None:
            raise unknown_stream(call_id)
        visit.call = live
        return live

    def _response(self, live: LiveCall, at: tuple[int, ...] | None, stream: bool) -> CallResponse:
        dialect = dialect_of(live.opened.url)(live.call, live.tokenizer, live.opened)
        return CallResponse(live, dialect, self._progress, self._link.forget, at, stream)

    async def _progress(self, live: LiveCall) -> str:
        try:
            return await self._link.ask("progress", request_ids=live.opened.request_ids)
        except BadRequest as error:
            return error.message


def unknown_stream(call_id: str) -> BadRequest:
    """Return the error for a stream that cannot be continued."""
    return BadRequest(
        f"there is no stream {call_id[:MAX_ID]!r}; streams are kept for a minute after their end",
        code="stream_not_found",
        status=404,
    )


def positions(
    last_event_id: str | None, num_choices: int, param: str = "Last-Event-ID"
) -> tuple[int, ...]:
    """Return the positions in the id of an event, one for each choice."""
    if last_event_id is None:
        return (NEW,) * num_choices
    parts = last_event_id.split(",")
    if len(parts) != num_choices or not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise BadRequest(f"{param} must be the id of an event of this stream", param)
    return tuple(map(int, parts))


def _add_generation(app: FastAPI, generation: Generation) -> None:
    def post(url: str) -> Callable[[Request], Awaitable[Any]]:
        async def create(request: Request) -> Any:
            return await generation.create(url, request)

        return create

    for url, summary in (
        (CHAT, "Answer a conversation"),
        (COMPLETIONS, "Continue a text"),
        (RESPONSES, "Answer a conversation, in the form of OpenAI's Responses"),
        (MESSAGES, "Answer a conversation, in the form of Anthropic's Messages"),
    ):
        app.add_api_route(url, post(url), methods=["POST"], summary=summary)

    @app.get(f"{RESPONSES}/{{response_id}}", summary="A response, or the rest of its stream")
    async def retrieve(response_id: str, request: Request) -> Any:
        return await generation.retrieve(response_id, request)

    @app.get("/v1/streams/{call_id}", summary="Continue a stream that was cut off")
    async def resume(call_id: str, request: Request) -> Any:
        return await generation.resume(call_id, request)


# --- state ---------------------------------------------------------------------------------------


def _add_state(app: FastAPI, link: Link) -> None:
    @app.get("/v1/models", summary="The models that this server has")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(link, name) for name in link.names]}

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> dict[str, Any]:
        if name not in link.names:
            raise BadRequest(
                f"there is no model {name!r} here", "model", "model_not_found", status=404
            )
        return _model(link, name)

    @app.get("/live", summary="200 while rank 0 runs")
    async def live() -> Response:
        silent = link.silent_s > SILENT_S
        return JSONResponse({"silent_s": round(link.silent_s, 1)}, 503 if silent else 200)

    @app.get("/ready", summary="200 while requests are taken and make progress")
    @app.get("/health", summary="The same as /ready")
    async def ready() -> Response:
        problem = link.problem
        state = link.state.state
        return JSONResponse({"state": state, "reason": problem}, 503 if problem else 200)

    @app.get("/version", summary="The version of mellmpi")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/load", summary="Requests in progress")
    async def load() -> Any:
        return json.loads(await link.ask("load"))

    @app.get("/metrics", summary="Prometheus metrics")
    async def metrics(request: Request) -> Response:
        found = json.loads(await link.ask("metrics"))
        accept = request.headers.get("accept", "")
        # In a thread: with many workers it takes longer than streams may pause.
        kind, body = await run_in_threadpool(render, found["samples"], accept, found["vllm"])
        return Response(body, media_type=kind)


def _model(link: Link, name: str) -> dict[str, Any]:
    limits = {limit.name: limit for limit in link.state.limits}
    found = limits.get(name)
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "mellmpi",
        "max_model_len": found.max_model_len if found else None,
    }
