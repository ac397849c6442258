"""A connection of a client: uvicorn's, with limits of size and time."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mellmpi.protocol import ServerLimits

MAX_HEAD_BYTES = 64 << 10  # request line and headers
MAX_HEADERS = 200
FULL = (
    b'{"error": {"message": "too many connections", "type": "overloaded_error", '
    b'"param": null, "code": "overloaded"}}'
)
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(FULL), FULL)
)


class Connection(HttpToolsProtocol):
    """Ends if a request does not arrive in time, or if the client does not read its answer."""

    def __init__(self, limits: ServerLimits, **given: Any):
        super().__init__(**given)
        self._limits = limits
        self._arrival: asyncio.TimerHandle | None = None  # ends the wait for a part of a request
        self._reading: asyncio.TimerHandle | None = None  # ends the wait for the client to read
        self._fed = self._header_bytes = self._num_headers = 0
        self._in_head = self._began = False
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            transport.write(REFUSAL)
            transport.close()
            return
        self._expect(self._limits.head_within_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._watch(None)
        super().connection_lost(exc)

    # --- the request -----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.timeout_keep_alive_task is not None:  # of the wait for the next request
            self._expect(self._limits.head_within_s)
        self._began = False
        super().data_received(data)
        if self._in_head and not self._began:
            self._fed += len(data)
            if self._fed > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The headers are longer than {MAX_HEAD_BYTES >> 10} KB.")

    # Whatever the following methods raise, the parser reports as an error of the request.

    def on_message_begin(self) -> None:
        self._in_head = self._began = True
        self._fed = self._header_bytes = self._num_headers = 0
        self._expect(self._limits.head_within_s)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._header_bytes += len(name) + len(value)
        if self._num_headers > MAX_HEADERS or self._header_bytes > MAX_HEAD_BYTES:
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._expect(self._limits.body_within_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._expect(None)
        super().on_message_complete()

    def _expect(self, limit_s: float | None) -> None:
        """End the connection after this time; None: what was expected has come."""
        if self._arrival is not None:
            self._arrival.cancel()
        self._arrival = None if limit_s is None else self.loop.call_later(limit_s, self._abort)

    def _abort(self) -> None:
        self.transport.abort()

    # --- the answer ------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self._limits.read_within_s)

    def resume_writing(self) -> None:
        self._watch(None)
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()  # closes once the client has read all
        if self.transport.get_write_buffer_size():
            self._watch(self._limits.read_within_s)

    def _watch(self, limit_s: float | None) -> None:
        """End the connection if the client reads nothing for this time."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if limit_s is not None:
            self._unread = self.transport.get_write_buffer_size()
            self._reading = self.loop.call_later(limit_s, self._check_reading)

    def _check_reading(self) -> None:
        if self.transport.get_write_buffer_size() < self._unread:
            self._watch(self._limits.read_within_s)
        else:
            self.transport.abort()
