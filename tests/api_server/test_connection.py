"""Limits of a connection, without a network: what it takes of a head, how long it waits."""

import asyncio
from dataclasses import replace

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
        self.aborted = asyncio.Event()
        self.unread = lambda: 0  # bytes in the buffer

    def write(self, data):
        self.written += data

    def close(self):
        self.closed = True

    def abort(self):
        self.closed = True
        self.aborted.set()

    def get_write_buffer_size(self):
        return self.unread()

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
        connection, wire = connected(LIMITS, app)
        taken = 0
        while taken < len(data) and not wire.closed:
            connection.data_received(data[taken : taken + piece])
            taken += piece
        while connection.tasks:
            await asyncio.wait(connection.tasks)
        connection.connection_lost(None)
        return taken, wire.written

    return *asyncio.run(feed()), seen


def connected(limits, app=None):
    """A new connection and its transport, in a running loop."""
    config = uvicorn.Config(app or (lambda *_: None), lifespan="off", log_config=None)
    config.load()
    loop = asyncio.get_running_loop()
    state = ServerState()
    connection = Connection(limits, config=config, server_state=state, app_state={}, _loop=loop)
    wire = Wire()
    connection.connection_made(wire)
    return connection, wire


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


# --- time ----------------------------------------------------------------------------------------

NEVER = replace(LIMITS, head_within_s=1e6, body_within_s=1e6, read_within_s=1e6)
HEAD = START + b"content-length: 10\r\n\r\n"


async def idle(scope, receive, send):
    await receive()


@pytest.mark.parametrize(
    ("limit", "sent"),
    [("head_within_s", b""), ("head_within_s", START), ("body_within_s", HEAD + b"a")],
)
def test_what_does_not_arrive_ends_the_connection(limit, sent):
    async def wait():
        connection, wire = connected(replace(NEVER, **{limit: 0.01}), idle)
        if sent:
            connection.data_received(sent)
        await asyncio.wait_for(wire.aborted.wait(), 20)
        connection.connection_lost(None)

    asyncio.run(wait())


def test_what_has_arrived_is_not_waited_for():
    async def wait():
        limits = replace(NEVER, head_within_s=1.0)
        connection, _ = connected(limits, idle)
        connection.data_received(HEAD)
        assert connection._arrival.when() > connection.loop.time() + 1e5  # for the body
        connection.data_received(b"a" * 10)
        assert connection._arrival is None
        connection.connection_lost(None)

    asyncio.run(wait())


@pytest.mark.parametrize("begin", ["pause_writing", "timeout_keep_alive_handler"])
def test_a_client_that_reads_nothing_ends_and_one_that_reads_slowly_does_not(begin):
    async def wait():
        connection, wire = connected(replace(NEVER, read_within_s=0.01))
        sizes = [500, 400, 300, 200, 100]
        asked = []

        def unread():
            asked.append(sizes.pop(0) if sizes else 100)
            return asked[-1]

        wire.unread = unread
        getattr(connection, begin)()
        await asyncio.wait_for(wire.aborted.wait(), 20)
        assert not sizes, "it was still reading"
        connection.connection_lost(None)

    asyncio.run(wait())


def test_a_client_that_has_read_is_not_watched():
    async def wait():
        connection, _ = connected(NEVER)
        connection.pause_writing()
        assert connection._reading is not None
        connection.resume_writing()
        assert connection._reading is None
        connection.pause_writing()
        connection.connection_lost(None)
        assert connection._reading is None

    asyncio.run(wait())
