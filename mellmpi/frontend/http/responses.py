"""Responses that wait for the answer of a call: one body, or a stream of events."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mellmpi.frontend.dialects import COMMENT, Dialect
from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.http.calls import LiveCall, News

COMMENT_EVERY_S = 15.0  # of silence: proxies end connections that are silent for a minute
FIRST_NEWS_S = 1.0  # an error that comes within it gets a status of its own, before a stream begins

Progress = Callable[[LiveCall], Any]  # awaitable text of a comment


class CallResponse(Response):
    """Sends the answer of a call. Cancels the call if its last client leaves."""

    def __init__(
        self,
        call: LiveCall,
        dialect: Dialect,
        progress: Progress,
        leave: Callable[[LiveCall], None],
        positions: tuple[int, ...] | None = None,
        stream: bool = True,
    ):
        """
        positions  where in each choice the client continues; None: a first response
        stream     False: one body
        leave      called when no client is left and the call has not ended
        """
        super().__init__()
        self._call, self._dialect = call, dialect
        self._progress, self._leave, self._positions = progress, leave, positions
        self._news, self._as_stream = News(), stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call
        call.readers.add(self._news)
        answer = asyncio.ensure_future(self._answer(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            error = answer.exception() if answer.done() else None
            if error is not None and not isinstance(error, OSError):
                raise error
        finally:
            for task in (answer, gone):
                task.cancel()
            call.readers.discard(self._news)
            if not call.readers and not call.done:
                call.cancel()
                self._leave(call)

    async def _answer(self, send: Send) -> None:
        if not self._as_stream:
            while not self._call.done:
                await self._news.wait()
            error = self._call.error
            await (self._send_error(send, error) if error else self._send_body(send))
            return
        if not self._call.has_news:
            await self._news.wait(FIRST_NEWS_S)
        error, begun = self._call.error, any(output.tokens for output in self._call.outputs)
        if error is not None and self._positions is None and not begun:
            await self._send_error(send, error)
        else:
            await self._stream(send)

    async def _send_error(self, send: Send, error: BadRequest) -> None:
        body = json.dumps(self._dialect.error_body(error))
        await send_json(send, error.status, body, error.headers)

    async def _send_body(self, send: Send) -> None:
        body = json.dumps(self._dialect.body(self._call.outputs), ensure_ascii=False)
        await send_json(send, 200, body)

    async def _stream(self, send: Send) -> None:
        call, dialect = self._call, self._dialect
        positions = self._positions or (-1,) * len(call.outputs)
        cursors = dialect.start(positions, call.outputs)
        await send({"type": "http.response.start", "status": 200, "headers": self._event_headers()})
        while True:
            self._news.clear()
            if events := dialect.new(cursors, call.outputs):
                await self._write(send, events)
            if call.error is not None:
                await self._write(send, dialect.error(cursors, call.error))
                break
            if call.done and all(cursor.ended for cursor in cursors):
                await self._write(send, dialect.end(call.outputs))
                break
            if not await self._news.wait(COMMENT_EVERY_S):
                text = await self._progress(call)
                await self._write(send, COMMENT % text.encode())
        await send({"type": "http.response.body", "body": b""})

    async def _write(self, send: Send, data: bytes) -> None:
        # Waits while the client reads too slowly; `Connection` ends one that reads nothing. What
        # it has not read is kept once, in the call.
        await send({"type": "http.response.body", "body": data, "more_body": True})

    def _event_headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx
            (b"x-stream-id", self._call.opened.call_id.encode()),
        ]


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(
    send: Send, status: int, body: str, headers: tuple[tuple[str, str], ...] = ()
) -> None:
    """Send a response with a JSON body."""
    data = body.encode("utf-8", "backslashreplace")
    given = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    given += [(name.encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": given})
    await send({"type": "http.response.body", "body": data})
