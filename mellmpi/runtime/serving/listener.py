"""The socket that the API servers accept connections on."""

import errno
import socket

from mellmpi.config import HttpConfig, UsageError
from mellmpi.runtime.serving.settings import check_open

BACKLOG = 2048  # connections that wait while an API server starts or restarts


def listen(config: HttpConfig) -> socket.socket:
    """Bind and listen. Raises UsageError that says what to type instead."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        check_open(config, str(address[0]))
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except socket.gaierror as error:
        raise UsageError(f"--host {config.host}: {error.strerror}") from error
    except OSError as error:
        raise UsageError(_problem(config, error)) from error
    return listener


def _problem(config: HttpConfig, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {config.port} is in use: give another with --port {config.port + 1}, or "
            "--port 0 for any that is free"
        )
    if error.errno == errno.EACCES:
        return f"port {config.port} is for root alone: give one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {config.host} is no address of this machine; 0.0.0.0 stands for all"
    return f"cannot listen on {config.host}:{config.port}: {error.strerror}"


def url_of(listener: socket.socket, config: HttpConfig) -> str:
    """Return the URL of the server."""
    scheme = "https" if config.ssl_certfile else "http"
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    return f"{scheme}://{f'[{shown}]' if ':' in shown else shown}:{port}"
