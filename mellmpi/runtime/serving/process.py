"""An API server as a child process of rank 0, and the pipe to it."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from mellmpi.protocol import Decoder, Encoder, ServerSettings

PIECE_BYTES = 1 << 20
MAX_UNSENT_BYTES = 256 << 20  # a child that reads so little hangs
LAUNCHER_VARIABLES = ("OMPI_", "PMIX_", "PRTE_", "PMI_")  # a child is no rank


class ApiServer:
    """One child process. Reads and writes never block; a failure of the pipe ends the child."""

    def __init__(self, listener: socket.socket, index: int, settings: ServerSettings):
        self.index = index
        self._decoder, self._encoder = Decoder(), Encoder()
        self._unsent = bytearray()
        self.pipe, childs = socket.socketpair()
        with childs:
            self.process = _start(listener, childs)
        self.pipe.setblocking(False)
        self.send(settings)
        self.flush()

    def fileno(self) -> int:
        return self.pipe.fileno()

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def send(self, message: Any) -> None:
        """Add a message to those that `flush` writes."""
        self._encoder.add(message)

    def flush(self) -> bool:
        """Write as much as the pipe takes. Returns whether anything is left."""
        self._unsent += self._encoder.take()
        while self._unsent:
            try:
                del self._unsent[: self.pipe.send(self._unsent)]
            except BlockingIOError:
                if len(self._unsent) > MAX_UNSENT_BYTES:
                    self.kill()
                return True
            except OSError:  # the child has died: `receive` tells
                self._unsent.clear()
        return False

    def receive(self) -> Iterable[Any]:
        """Return the messages that have arrived. Raises EOFError if the child has died."""
        messages: list[Any] = []
        while True:
            try:
                data = self.pipe.recv(PIECE_BYTES)
            except BlockingIOError:
                return messages
            except OSError:
                data = b""
            if not data:
                if messages:
                    return messages
                raise EOFError
            messages += self._decoder.feed(data)

    def kill(self) -> None:
        """End the process now."""
        self.process.kill()

    def close(self, limit_s: float = 5.0) -> None:
        """End the pipe, which ends the process in an orderly way; kill it after `limit_s`."""
        self.pipe.close()
        try:
            self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _start(listener: socket.socket, pipe: socket.socket) -> "subprocess.Popen[bytes]":
    """Start the process with both descriptors."""
    descriptors = [listener.fileno(), pipe.fileno()]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)
    }
    command = [sys.executable, "-m", "mellmpi.frontend.http", *map(str, descriptors)]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, pass_fds=descriptors
    )
    _unbind(process.pid)
    return process


def _unbind(pid: int) -> None:
    """Let the process run on every core: mpirun may have bound rank 0, and it inherits that."""
    with contextlib.suppress(OSError):  # a control group of the batch system forbids it
        os.sched_setaffinity(pid, range(os.cpu_count() or 1))
