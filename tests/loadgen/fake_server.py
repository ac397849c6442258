"""A small OpenAI server in a thread, which answers as it is told and keeps what it was sent."""

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web

USAGE, ROLE, DONE = "usage", "role", "done"


@dataclass
class Fake:
    """The behaviour of the server. `bodies` and `headers` are those of the requests so far."""

    tokens: int | None = None  # of an answer; None: as many as asked for
    per_chunk: int = 1
    with_usage: bool = True
    status: Callable[[int], int] = lambda number: 200  # of the n-th request, from 0
    cut_after: int | None = None  # chunks, then the connection is closed
    error_after: int | None = None  # chunks, then an event tells of an error
    streams: bool = True
    hangs_from: int | None = None  # number of the first request that gets no answer
    line_end: bytes = b"\n"
    ends_bare: bool = False  # without a finish reason, and without a blank line after [DONE]
    bodies: list = field(default_factory=list)
    headers: list = field(default_factory=list)
    url: str = ""
    hanging: threading.Event = field(default_factory=threading.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request):
        number = len(self.bodies)
        self.bodies.append(await request.json())
        self.headers.append(request.headers)
        if self.hangs_from is not None and number >= self.hangs_from:
            self.hanging.set()
            await self.released.wait()
        if (status := self.status(number)) != 200:
            return web.json_response({"error": {"message": f"no, {number}"}}, status=status)
        if not self.streams:
            return web.json_response(self._whole(self.bodies[-1]))
        return await self._stream(request, self.bodies[-1])

    async def _stream(self, request, body):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        wanted = self.tokens if self.tokens is not None else body["max_tokens"]
        is_chat = "messages" in body
        await response.write(b": a comment" + 2 * self.line_end)
        if is_chat:
            await self._event(response, {"choices": [{"delta": {"role": "assistant"}}]})
        for i, first in enumerate(range(0, wanted, self.per_chunk)):
            if i == self.cut_after:
                request.transport.abort()
                return response
            if i == self.error_after:
                await self._event(response, {"error": {"message": "out of blocks"}})
                return response
            number = min(self.per_chunk, wanted - first)
            is_last = first + number == wanted and not self.ends_bare
            await self._event(response, self._chunk("a " * number, is_chat, is_last))
        if self.with_usage and body.get("stream_options", {}).get("include_usage"):
            usage = {"prompt_tokens": 7, "completion_tokens": wanted, "total_tokens": 7 + wanted}
            await self._event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]" + (b"" if self.ends_bare else 2 * self.line_end))
        return response

    async def _event(self, response, chunk):
        await response.write(b"data: " + json.dumps(chunk).encode() + 2 * self.line_end)

    def _chunk(self, text, is_chat, is_last):
        content = {"delta": {"content": text}} if is_chat else {"text": text}
        return {"choices": [content | {"finish_reason": "length" if is_last else None}]}

    def _whole(self, body):
        return {
            "choices": [{"text": "a a", "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 2},
        }


@contextmanager
def serving(fake):
    """Serve until the end of the block; `fake.url` is the address."""
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def start():
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/completions", fake.answer)
        app.router.add_post("/v1/chat/completions", fake.answer)
        app.router.add_get("/v1/models", _models)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        ready.set()
        return runner

    def run():
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(fake.released.set)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


async def _models(request):
    return web.json_response({"object": "list", "data": [{"id": "fake"}]})
