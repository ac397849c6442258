"""The process of an API server: `python -m mellmpi.frontend.http LISTENER PIPE`.

Both arguments are descriptors that rank 0 has opened: a listening socket, and a socket to rank 0.
"""

import asyncio
import contextlib
import ctypes
import functools
import logging
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from mellmpi.frontend.http.access_log import AccessLog
from mellmpi.frontend.http.app import bad_request, make_app
from mellmpi.frontend.http.batches import BatchWatch
from mellmpi.frontend.http.connection import Connection
from mellmpi.frontend.http.gate import Gate, with_cors
from mellmpi.frontend.http.link import Link
from mellmpi.protocol import ServerLimits, ServerSettings

log = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1  # prctl(2)
OWN_FILES = 64  # descriptors besides connections
SWITCH_S = 0.001  # after which the event loop gets the interpreter lock back from a thread
GRACE_S = 2.0  # for responses to end after rank 0 has


class Server(uvicorn.Server):
    """uvicorn without signals: this process ends when rank 0 does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(listener: socket.socket, pipe: socket.socket) -> None:
    """Serve until the pipe ends."""
    loop = asyncio.get_running_loop()
    server: Server | None = None

    def end() -> None:
        if server is not None:
            server.should_exit = True

    _, link = await loop.create_connection(lambda: Link(end), sock=pipe)
    if (settings := await link.wait_settings()) is None:
        return
    app = make_app(link)
    gate = Gate(app, bad_request, AccessLog(settings.access_log))
    gate.configure(settings)
    config = _config(with_cors(gate, settings.allowed_origins), settings)
    config.load()

    def configure(changed: ServerSettings) -> None:
        gate.configure(changed)
        if config.ssl is not None:
            _load_certificate(config.ssl, changed)

    link.on_settings = configure
    server = Server(config)
    batches = asyncio.create_task(BatchWatch(link, settings.batch_dir).run())
    await server.serve(sockets=[listener])
    batches.cancel()


def _config(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    connection: Any = functools.partial(Connection, _fitting(settings.limits))
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=int(GRACE_S),
        server_header=False,
        ssl_certfile=settings.certfile or None,
        ssl_keyfile=settings.keyfile or None,
    )


def _load_certificate(context: ssl.SSLContext, settings: ServerSettings) -> None:
    """Use a certificate that has changed for new connections."""
    try:
        context.load_cert_chain(settings.certfile, settings.keyfile or None, password="")
    except OSError as error:  # it has changed since rank 0 tried it
        log.warning("%s: %s", settings.certfile, error)


def _fitting(limits: ServerLimits) -> ServerLimits:
    """Return limits with as many connections as this process may have open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft == resource.RLIM_INFINITY:
        return limits
    return replace(limits, max_connections=min(limits.max_connections, max(1, soft - OWN_FILES)))


def main() -> None:
    """Run the server on the descriptors of the command line."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a hung process ends with rank 0
    logging.basicConfig(format="mellmpi[%(process)d] %(levelname)s %(name)s: %(message)s")
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # warns of clients' faults
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 ends the job, and this process with it
    sys.setswitchinterval(SWITCH_S)
    listener, pipe = (socket.socket(fileno=int(argument)) for argument in sys.argv[1:3])
    pipe.setblocking(False)
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(serve(listener, pipe))


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


if __name__ == "__main__":
    main()
