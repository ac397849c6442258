"""The open port and its API servers, before MPI starts. Imports little: the URL comes at once."""

import socket
import sys
from dataclasses import dataclass

from mellmpi.config import Options
from mellmpi.runtime.serving.listener import listen, url_of
from mellmpi.runtime.serving.process import ApiServer
from mellmpi.runtime.serving.settings import Settings


@dataclass
class Door:
    """The open port and the API servers, which exist before MPI has started."""

    listener: socket.socket
    servers: list[ApiServer]
    settings: Settings
    url: str


def open_door(options: Options) -> Door:
    """Open the port and start the API servers. Raises UsageError.

    Before MPI starts: a child that is started later could inherit its connections.
    """
    settings = Settings(options.http)
    listener = listen(options.http)
    servers = [
        ApiServer(listener, index, settings.message)
        for index in range(options.http.api_server_count)
    ]
    door = Door(listener, servers, settings, url_of(listener, options.http))
    say(f"serving on {door.url} (API: {door.url}/docs); the model is loading")
    return door


def say(text: str) -> None:
    """Print a line for the user."""
    sys.stderr.write(f"mellmpi: {text}\n")
    sys.stderr.flush()
