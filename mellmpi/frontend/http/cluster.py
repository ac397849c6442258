"""The routes of operators: the state of the job; commands that drain workers, move requests."""

import asyncio
import json
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from mellmpi.frontend.dialects import COMMENT
from mellmpi.frontend.fields import BadRequest, Fields
from mellmpi.frontend.http.body import read_body
from mellmpi.frontend.http.link import Link
from mellmpi.frontend.strict_json import json_object

SNAPSHOT_EVERY_S = 0.25
MAX_COMMAND_BYTES = 10_000


class Watch:
    """Snapshots for all who watch: rank 0 makes one at a time, and none while nobody watches."""

    def __init__(self, link: Link):
        self._link = link
        self._newest: asyncio.Task[str] | None = None

    async def snapshot(self) -> str:
        """Return the state of the job as JSON. Callers at the same time share one."""
        if self._newest is None or self._newest.done():
            self._newest = asyncio.ensure_future(self._link.ask("snapshot"))
        return await asyncio.shield(self._newest)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield a snapshot every SNAPSHOT_EVERY_S; a comment if rank 0 does not answer."""
        while True:
            try:
                yield b"data: %b\n\n" % (await self.snapshot()).encode()
            except BadRequest as error:
                yield COMMENT % error.message.encode()
            await asyncio.sleep(SNAPSHOT_EVERY_S)


def add_cluster(app: FastAPI, link: Link) -> None:
    """Add the page and the routes of operators."""
    watch = Watch(link)
    page = (files("mellmpi.frontend.http") / "static" / "index.html").read_text(encoding="utf-8")

    @app.get("/", summary="A page that shows the job", response_class=HTMLResponse)
    async def show() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": "frame-ancestors 'none'"})

    @app.get("/v1/cluster", summary="Workers, their requests, the queue, the last migrations")
    async def snapshot() -> Response:
        return Response(await watch.snapshot(), media_type="application/json")

    @app.get("/v1/cluster/events", summary="The same, four times a second, as events")
    async def events() -> Response:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamingResponse(watch.events(), media_type="text/event-stream", headers=headers)

    _add_commands(app, link)


def _add_commands(app: FastAPI, link: Link) -> None:
    @app.post("/v1/cluster/workers/{worker}/drain", summary="Move its requests away, and park it")
    async def drain(worker: int) -> dict[str, Any]:
        return _done(await link.ask("drain", worker=worker))

    @app.post("/v1/cluster/workers/{worker}/undrain", summary="Let it take requests again")
    async def undrain(worker: int) -> dict[str, Any]:
        return _done(await link.ask("undrain", worker=worker))

    @app.post("/v1/cluster/requests/{request_id}/migrate", summary="Move a request to a worker")
    async def migrate(request_id: int, request: Request) -> dict[str, Any]:
        fields = Fields(json_object(await read_body(request, MAX_COMMAND_BYTES)), chat=False)
        worker = fields.integer("worker", None, low=1)
        if worker is None:
            raise BadRequest('say where to:  {"worker": 2}', "worker")
        return _done(await link.ask("migrate", request_id=request_id, worker=worker))

    @app.post("/v1/cluster/loglevel", summary="Change how much rank 0 logs")
    async def loglevel(request: Request) -> dict[str, Any]:
        fields = Fields(json_object(await read_body(request, MAX_COMMAND_BYTES)), chat=False)
        return _done(await link.ask("loglevel", level=fields.get("level", str) or ""))


def _done(body: str) -> dict[str, Any]:
    return json.loads(body) if body else {"ok": True}
