"""A client of `/v1/cluster`: snapshots, their stream, and the commands of an operator."""

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from mellmpi.config import UsageError
from mellmpi.files import visible

CONNECT_S = 10.0
SILENT_S = 30.0  # longest silence of a stream, which has a comment every 15 s
LONGEST_LINE = 64 << 20  # bytes of one event


class ServerProblem(Exception):
    """The server failed, or went away."""


class Server:
    """A server at a URL. UsageError for what the user can correct, else ServerProblem."""

    def __init__(self, url: str, api_key: str | None = None):
        self._key = api_key
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise UsageError(f"--url {visible(url)}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--url {visible(url)} is no address such as http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        self._host, self._port, self._path = parts.hostname, port, parts.path.rstrip("/")
        self._connection = HTTPSConnection if secure else HTTPConnection
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{self._path}"

    def snapshot(self) -> dict[str, Any]:
        """The job now."""
        return self._answer("GET", "/v1/cluster")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a command; return the server's answer."""
        return self._answer("POST", path, body)

    def snapshots(self) -> Iterator[dict[str, Any]]:
        """The job, again and again, until the server ends the stream."""
        with closing(self._connect(SILENT_S)) as connection:
            response = self._open(connection, "GET", "/v1/cluster/events", None)
            try:
                while line := response.readline(LONGEST_LINE):
                    if line.startswith(b"data:"):
                        yield self._parsed(line[5:])
            except (OSError, HTTPException) as error:
                raise ServerProblem(f"{self.url} went away: {error}") from error

    def _connect(self, timeout_s: float) -> HTTPConnection:
        return self._connection(self._host, self._port, timeout=timeout_s)

    def _answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with closing(self._connect(CONNECT_S)) as connection:
            response = self._open(connection, method, path, body)
            try:
                return self._parsed(response.read() or b"{}")
            except (OSError, HTTPException) as error:
                raise ServerProblem(f"{self.url} went away: {error}") from error

    def _parsed(self, data: bytes) -> dict[str, Any]:
        try:
            found = json.loads(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UsageError(f"{self.url} is no mellmpi server: --url names another one")
        return found

    def _open(
        self, connection: HTTPConnection, method: str, path: str, body: dict[str, Any] | None
    ) -> HTTPResponse:
        headers = {"Accept": "application/json, text/event-stream"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, self._path + path, data, headers)
            response = connection.getresponse()
            if response.status < 300:
                return response
            message = _message(response)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a key with a line end
            raise self._unreachable(error) from error
        raise self._refused(response.status, message)

    def _unreachable(self, error: Exception) -> Exception:
        if isinstance(error, ConnectionRefusedError):
            return UsageError(
                f"no server answers at {self.url}. Start one with\n"
                "  mpirun -np 3 python -m mellmpi serve\n"
                "or give its address:  --url http://HOST:PORT"
            )
        if isinstance(error, socket.gaierror | ValueError):
            return UsageError(f"{self.url} cannot be asked: {error}; check --url and --api-key")
        return ServerProblem(f"{self.url} does not answer: {error or type(error).__name__}")

    def _refused(self, status: int, message: str) -> Exception:
        if status == 401:
            why = "does not accept this key" if self._key else "needs a key"
            return UsageError(
                f"{self.url} {why}: give one with  --api-key KEY  or in the environment as "
                "MELLMPI_API_KEY"
            )
        if status >= 500:
            return ServerProblem(f"{self.url} failed: {message} ({status})")
        return UsageError(f"{message} ({status})")


def _message(response: HTTPResponse) -> str:
    """The text of an error; that of its status if the body has another form."""
    try:
        return visible(str(json.loads(response.read(1 << 16))["error"]["message"]))
    except (ValueError, KeyError, TypeError):
        return visible(response.reason)
