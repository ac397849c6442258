"""A server with the routes that page and terminal use; a test decides what it answers.

`python -m tests.page.server PORT [SCENE]` serves the page with a simulated job, in real time.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from tests.page.scene import SCENES

PAGE = files("mellmpi") / "frontend" / "http" / "static" / "index.html"


class FakeServer:
    """Serves `snapshot()`; keeps what is posted. A context manager."""

    def __init__(self, snapshot: Callable[[], dict[str, Any]], port: int = 0, key: str = ""):
        self.snapshot, self.key = snapshot, key
        self.period_s = 0.25
        self.posted: list[tuple[str, Any]] = []  # (path, body)
        self.seen = threading.Condition()  # notified for every body that is posted
        self.answer = ["A request ", "moves ", "<b>while</b> ", "it decodes."]
        self.piece_s = 0.0
        self.has_template = True
        self.refusal: tuple[int, str] | None = None  # of operators' commands
        self.disconnected = threading.Event()  # a client has left a stream of an answer
        self._end = threading.Event()
        fake = self

        class Routes(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake._get(self)

            def do_POST(self) -> None:
                fake._post(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Routes)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, path: str, timeout_s: float = 20.0) -> Any:
        """The body posted to `path`, once it has come."""
        with self.seen:
            assert self.seen.wait_for(lambda: path in dict(self.posted), timeout_s), self.posted
            return dict(self.posted)[path]

    # --- routes ---

    def _get(self, route: BaseHTTPRequestHandler) -> None:
        if route.path == "/":
            return _send(route, 200, PAGE.read_bytes(), "text/html; charset=utf-8")
        if self._is_refused(route):
            return None
        if route.path == "/v1/cluster":
            return _send_json(route, 200, self.snapshot())
        if route.path == "/v1/cluster/events":
            return self._events(route)
        return _error(route, 404, f"there is no {route.path}")

    def _is_refused(self, route: BaseHTTPRequestHandler) -> bool:
        given = route.headers.get("Authorization", "")
        if self.key and given != f"Bearer {self.key}":
            _error(route, 401, "this server needs a key" if not given else "the key is unknown")
            return True
        return False

    def _events(self, route: BaseHTTPRequestHandler) -> None:
        _begin_stream(route)
        try:
            while not self._end.is_set():
                _event(route, json.dumps(self.snapshot()))
                self._end.wait(self.period_s)
        except OSError:
            pass

    def _post(self, route: BaseHTTPRequestHandler) -> None:
        body = json.loads(route.rfile.read(int(route.headers["Content-Length"])) or b"{}")
        if self._is_refused(route):
            return None
        with self.seen:
            self.posted.append((route.path, body))
            self.seen.notify_all()
        if route.path == "/v1/chat/completions" and not self.has_template:
            why = "this model has no chat template; use /v1/completions instead"
            return _error(route, 400, why)
        if route.path.endswith("/completions"):
            return self._complete(route, chat="chat" in route.path)
        if self.refusal is not None:
            return _error(route, *self.refusal)
        return _send_json(route, 200, {})

    def _complete(self, route: BaseHTTPRequestHandler, chat: bool) -> None:
        _begin_stream(route)
        try:
            for piece in self.answer:
                choice = {"delta": {"content": piece}} if chat else {"text": piece}
                _event(route, json.dumps({"choices": [{"index": 0, **choice}]}))
                self._end.wait(self.piece_s)
            _event(route, "[DONE]")
        except OSError:
            self.disconnected.set()


def _begin_stream(route: BaseHTTPRequestHandler) -> None:
    route.send_response(200)
    route.send_header("Content-Type", "text/event-stream")
    route.send_header("Connection", "close")
    route.end_headers()
    route.close_connection = True


def _event(route: BaseHTTPRequestHandler, data: str) -> None:
    route.wfile.write(f"data: {data}\n\n".encode())
    route.wfile.flush()


def _error(route: BaseHTTPRequestHandler, status: int, message: str) -> None:
    _send_json(route, status, {"error": {"message": message, "type": "error", "code": status}})


def _send_json(route: BaseHTTPRequestHandler, status: int, body: Any) -> None:
    _send(route, status, json.dumps(body).encode(), "application/json")


def _send(route: BaseHTTPRequestHandler, status: int, body: bytes, kind: str) -> None:
    route.send_response(status)
    route.send_header("Content-Type", kind)
    route.send_header("Content-Length", str(len(body)))
    route.end_headers()
    route.wfile.write(body)


def live(name: str, skip_s: float = 0.0) -> Callable[[], dict[str, Any]]:
    """Snapshots of a scene in real time, from `skip_s` on."""
    scene, begun, lock = SCENES[name](), time.monotonic(), threading.Lock()

    def snapshot() -> dict[str, Any]:
        with lock:
            return scene.at(skip_s + time.monotonic() - begun)

    return snapshot


if __name__ == "__main__":
    port, scene, skip_s = [*sys.argv[1:], "small", "0"][:3] if len(sys.argv) < 4 else sys.argv[1:4]
    with FakeServer(live(scene, float(skip_s)), int(port)) as server:
        server.piece_s = 0.1
        threading.Event().wait()
