"""Limits of a connection, without a network: what it takes of a head before it gives up."""

import asyncio

import pytest
import uvicorn
from uvicorn.server import ServerState

from mellmpi.frontend.http.connection import MAX_HEAD_BYTES, MAX_HEADERS, Connection
from mellmpi.runtime.serving.settings import LIMITS

PIECE = 8 << 10
START = b"POST / HTTP/1.1\r\nhost: x\r\n"


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self):
        super().__init__()
        self.written, self.closed = b"", False

    def write(self, data):
        self.written += data

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed

    def get_extra_info(self, name, default=None):
        return default

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


def fed(data, piece=PIECE):
    """Feed a connection; the number of bytes that it took, what it wrote, the requests it saw."""
    seen = []

    async def app(scope, receive, send):
        seen.append(scope)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def feed():
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        connection = Connection(
            LIMITS,
            config=config,
            server_state=ServerState(),
            app_state={},
            _loop=asyncio.get_running_loop(),
        )
        wire = Wire()
        connection.connection_made(wire)
        taken = 0
        while taken < len(data) and not wire.closed:
            connection.data_received(data[taken : taken + piece])
            taken += piece
        while connection.tasks:
            await asyncio.wait(connection.tasks)
        connection.connection_lost(None)
        return taken, wire.written

    return *asyncio.run(feed()), seen


@pytest.mark.parametrize(
    "flood",
    [
        START + b"a" * (1 << 20),
        START + b"a: " + b"b" * (1 << 20),
        START + b"a: b\r\n" * (1 << 18),
        b"GET /" + b"a" * (1 << 20),
        b"a" * (1 << 20),
    ],
    ids=["name", "value", "many", "path", "method"],
)
@pytest.mark.parametrize("piece", [100, PIECE])
def test_a_head_without_end_is_refused_early(flood, piece):
    taken, written, seen = fed(flood, piece)
    assert taken <= MAX_HEAD_BYTES + 2 * PIECE
    assert written.startswith(b"HTTP/1.1 400 ") and not seen


def test_a_head_that_comes_at_once_has_the_same_limits():
    for head in (
        START + b"a: " + b"b" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"GET /" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n\r\n",
        START + b"a: b\r\n" * MAX_HEADERS + b"\r\n",
    ):
        _, written, seen = fed(head, len(head))
        assert written.startswith(b"HTTP/1.1 400 ") and not seen


@pytest.mark.parametrize("piece", [1, 1000, 1 << 20])
def test_long_bodies_and_many_requests_are_no_floods(piece):
    one = START + b"content-length: 100000\r\n\r\n" + b"a" * 100_000
    if piece == 1:
        one = START + b"content-length: 10\r\n\r\n" + b"a" * 10
    taken, _, seen = fed(one * 5, piece)
    assert taken >= len(one) * 5 and len(seen) == 5
