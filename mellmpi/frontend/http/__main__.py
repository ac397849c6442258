"""The process of an API server: `python -m mellmpi.frontend.http LISTENER PIPE`.

Both arguments are descriptors that rank 0 has opened: a listening socket, and a socket to rank 0.
"""

import asyncio
import contextlib
import ctypes
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from mellmpi.frontend.http.app import make_app
from mellmpi.frontend.http.link import Link

PR_SET_PDEATHSIG = 1  # prctl(2)
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
    config = uvicorn.Config(
        make_app(link),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=int(GRACE_S),
        server_header=False,
    )
    server = Server(config)
    await server.serve(sockets=[listener])


def main() -> None:
    """Run the server on the descriptors of the command line."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a hung process ends with rank 0
    logging.basicConfig(format="mellmpi[%(process)d] %(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 ends the job, and this process with it
    listener, pipe = (socket.socket(fileno=int(argument)) for argument in sys.argv[1:3])
    pipe.setblocking(False)
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        runner.run(serve(listener, pipe))


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


if __name__ == "__main__":
    main()
