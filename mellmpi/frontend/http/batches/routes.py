"""The routes /v1/files and /v1/batches, in OpenAI's form."""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from mellmpi.frontend.fields import BadRequest, Fields
from mellmpi.frontend.http.batches.store import BatchRecord, FileRecord, Store, new_id, record_of
from mellmpi.frontend.http.batches.upload import disk_problem, keep, read_form
from mellmpi.frontend.http.body import read_body
from mellmpi.frontend.http.link import Link
from mellmpi.frontend.openai import CHAT, COMPLETIONS
from mellmpi.frontend.strict_json import json_object

T = TypeVar("T")
MAX_BATCH_BYTES = 64 << 10  # of the body that creates a batch
FIELDS = ("input_file_id", "endpoint", "completion_window", "metadata")
UNITS_S = {"h": 3600, "d": 86400}
MOST_PAIRS, MAX_KEY, MAX_VALUE = 16, 64, 512  # of metadata
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}


class Desk:
    """What the routes need of the directory. Methods raise BadRequest."""

    def __init__(self, link: Link):
        self._link = link

    async def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return the result of a function of the `Store` and these arguments, run in a thread."""
        assert self._link.settings is not None
        if not (directory := self._link.settings.batch_dir):
            raise BadRequest(
                "this server keeps no files and batches: start it with --batch-dir DIR",
                code="no_batch_dir",
                status=404,
            )

        def run() -> T:
            try:
                return function(Store(Path(directory)), *arguments)
            except OSError as error:
                raise disk_problem(error) from error

        return await run_in_threadpool(run)

    async def file(self, file_id: str, request: Request) -> FileRecord:
        """Return a file of the client."""
        if (found := await self.ask(Store.file, file_id, owner_of(request))) is None:
            raise _unknown("file", file_id)
        return found

    async def batch(self, batch_id: str, request: Request) -> BatchRecord:
        """Return a batch of the client."""
        if (found := await self.ask(Store.batch, batch_id, owner_of(request))) is None:
            raise _unknown("batch", batch_id)
        return found


def owner_of(request: Request) -> str:
    """Return the name of the key of a request."""
    owner: str = request.state.visit.owner
    return owner


def _unknown(kind: str, given: str) -> BadRequest:
    return BadRequest(f"there is no {kind} {given[:64]!a}", code=f"{kind}_not_found", status=404)


def _json(body: Any) -> Response:
    return Response(json.dumps(body), media_type="application/json")


def add_batches(app: FastAPI, link: Link) -> None:
    """Add the routes."""
    desk = Desk(link)
    _add_files(app, desk)
    _add_batches(app, desk)


def _add_files(app: FastAPI, desk: Desk) -> None:
    @app.post("/v1/files", summary="Upload a file of requests", openapi_extra=FORM)
    async def upload(request: Request) -> Response:
        await desk.ask(lambda store: None)  # before the upload
        file = await read_form(request)
        try:
            return _json((await desk.ask(keep, file, owner_of(request))).body())
        finally:
            await file.close()

    @app.get("/v1/files", summary="The files of this key")
    async def files(
        request: Request,
        after: str | None = None,
        limit: int = 10_000,
        order: str = "desc",
        purpose: str | None = None,
    ) -> Response:
        found = await desk.ask(Store.files, owner_of(request))
        found = [file for file in found if purpose in (None, file.purpose)]
        if order not in ("asc", "desc"):
            raise BadRequest("order must be asc or desc", "order")
        return _json(page(found[:: -1 if order == "asc" else 1], after, limit, 10_000))

    @app.get("/v1/files/{file_id}", summary="One file")
    async def file(file_id: str, request: Request) -> Response:
        return _json((await desk.file(file_id, request)).body())

    @app.get("/v1/files/{file_id}/content", summary="The contents of a file")
    async def content(file_id: str, request: Request) -> Response:
        found = await desk.file(file_id, request)
        path = await desk.ask(Store.contents, found.id)
        return FileResponse(path, media_type="application/jsonl")

    @app.delete("/v1/files/{file_id}", summary="Delete a file")
    async def delete(file_id: str, request: Request) -> Response:
        found = await desk.file(file_id, request)
        await desk.ask(Store.delete, found.id)
        return _json({"id": file_id, "object": "file", "deleted": True})


def _add_batches(app: FastAPI, desk: Desk) -> None:
    @app.post("/v1/batches", summary="Answer the requests of a file")
    async def create(request: Request) -> Response:
        fields = wanted(json_object(await read_body(request, MAX_BATCH_BYTES)))
        await desk.file(fields["input_file_id"], request)
        ids = {"answers_id": new_id("file-"), "failures_id": new_id("file-")}
        owner, times = owner_of(request), {"validating": int(time.time())}
        batch = record_of(
            BatchRecord, id=new_id("batch_"), owner=owner, times=times, **ids, **fields
        )
        await desk.ask(Store.save, batch)
        return _json(batch.body())

    @app.get("/v1/batches", summary="The batches of this key")
    async def batches(request: Request, after: str | None = None, limit: int = 20) -> Response:
        return _json(page(await desk.ask(Store.batches, owner_of(request)), after, limit, 100))

    @app.get("/v1/batches/{batch_id}", summary="One batch")
    async def batch(batch_id: str, request: Request) -> Response:
        return _json((await desk.batch(batch_id, request)).body())

    @app.post("/v1/batches/{batch_id}/cancel", summary="Answer no more requests of a batch")
    async def cancel(batch_id: str, request: Request) -> Response:
        found = await desk.batch(batch_id, request)
        if found.has_ended:
            raise BadRequest(f"the batch has ended: it is {found.status}", code="batch_ended")
        await desk.ask(Store.cancel, found)
        return _json((await desk.batch(batch_id, request)).body())


def wanted(body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a new batch. Raises BadRequest."""
    fields = Fields(body, chat=False)
    for name, value in body.items():
        if name not in FIELDS and value is not None:
            raise BadRequest(f"{name[:40]!a} is not supported here; leave it out", name[:40])
    given = {name: fields.get(name, str) or "" for name in FIELDS[:3]}
    if not given["input_file_id"]:
        raise BadRequest("input_file_id is missing", "input_file_id")
    if given["endpoint"] not in (CHAT, COMPLETIONS):
        raise BadRequest(f"endpoint must be {CHAT} or {COMPLETIONS}", "endpoint")
    if (window := re.fullmatch("([1-9][0-9]{0,2})([hd])", given["completion_window"])) is None:
        raise BadRequest("completion_window must be a time such as 24h", "completion_window")
    window_s = int(window[1]) * UNITS_S[window[2]]
    metadata = _metadata(fields.get("metadata", dict))
    return {**given, "expires_at": int(time.time()) + window_s, "metadata": metadata}


def _metadata(given: dict[str, Any] | None) -> dict[str, str] | None:
    pairs = (given or {}).items()
    if len(pairs) > MOST_PAIRS or not all(
        len(key) <= MAX_KEY and isinstance(value, str) and len(value) <= MAX_VALUE
        for key, value in pairs
    ):
        raise BadRequest(
            f"metadata may have {MOST_PAIRS} pairs: names of {MAX_KEY} characters at most, "
            f"values that are text of {MAX_VALUE} at most",
            "metadata",
        )
    return given


def page(
    found: Sequence[FileRecord | BatchRecord], after: str | None, limit: int, most: int
) -> dict[str, Any]:
    """Return `limit` records behind the one with the id `after`. Raises BadRequest."""
    if not 1 <= limit <= most:
        raise BadRequest(f"limit must be 1 … {most}", "limit")
    ids = [record.id for record in found]
    if after is not None and after not in ids:
        raise BadRequest(f"there is no {after[:64]!a} in the list", "after")
    first = 0 if after is None else ids.index(after) + 1
    data = [record.body() for record in found[first : first + limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": first + limit < len(found),
    }
