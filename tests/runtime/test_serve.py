"""A server on real ranks: start, moves under its streams, lost workers, shutdown, misuse."""

import json
import re
import signal
import socket
import time

import httpx2 as httpx
import pytest

from tests.runtime.jobs import STRESS, TINY, Run

READY_S = 90.0
LONG = {"prompt": "abcdef", "max_tokens": 300, "ignore_eos": True, "temperature": 0}


class Server(Run):
    """A running server."""

    def __init__(self, num_ranks, *args, directory):
        super().__init__(num_ranks, "serve", "--port", "0", *args, directory=directory)
        self._end_s = time.monotonic() + READY_S
        self.url = self.said(r"serving on (http://\S+:\d+)")
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def said(self, pattern):
        """Wait until the server prints this; return the first group."""
        while not (found := re.search(pattern, self._err.read_text())):
            assert self.job.poll() is None and time.monotonic() < self._end_s, self._err.read_text()
            time.sleep(0.02)
        return found[1] if found.groups() else found[0]

    def complete(self, **body):
        """The text of a completion."""
        response = self.client.post("/v1/completions", json={**LONG, **body})
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def stream(self, **body):
        """Yield the pieces of a completion."""
        given = {**LONG, **body, "stream": True}
        with self.client.stream("POST", "/v1/completions", json=given) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])["choices"][0]["text"]

    def end(self, number=signal.SIGTERM):
        """Send a signal to rank 0; return the finished job."""
        self.client.close()
        rank0 = self.ranks().get(0)
        (rank0.send_signal if rank0 else self.job.send_signal)(number)
        return self.wait(60)


@pytest.fixture
def serve(tmp_path):
    """Start servers; kill those that still run at the end of the test."""
    started = []

    def start(num_ranks, *args):
        started.append(Server(num_ranks, *args, directory=tmp_path))
        return started[-1]

    yield start
    for server in started:
        if server.job.poll() is None:
            server.kill()


def test_answers_are_the_same_while_requests_move_and_when_a_worker_dies(serve):
    flags = (*TINY, *STRESS, "--kv-cache-memory-bytes", "8M")
    server = serve(4, *flags)
    expected = server.complete()  # requests before the workers are ready wait for them
    assert "".join(server.stream()) == expected
    pieces = server.stream(max_tokens=2000)
    text = next(pieces) + next(pieces)
    server.ranks()[1].kill()
    text += "".join(pieces)
    assert text == server.complete(max_tokens=2000) and text.startswith(expected)
    done = server.end()
    assert done.code == 0, done.err


def test_one_process_serves_too(serve, tmp_path):
    server = serve(1, *TINY, "--trace-out", str(tmp_path / "trace.json"))
    assert "".join(server.stream()) == server.complete()
    assert server.client.get("/ready").status_code == 200
    metrics = server.client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'mellmpi:generation_tokens_total{engine="1",model_name="random:tiny-llama"} 600.0' in (
        metrics.text.splitlines()
    )
    assert server.end(signal.SIGINT).code == 0
    events = json.loads((tmp_path / "trace.json").read_text())
    ends = [e["args"] for e in events if e["ph"] == "e" and e["cat"] == "request"]
    assert ends == [{"finish_reason": "length", "tokens": 300}] * 2


def test_a_server_asks_for_its_key(serve, monkeypatch):
    monkeypatch.setenv("MELLMPI_API_KEY", "the-key")
    server = serve(1, "--host", "0.0.0.0", *TINY)
    port = server.url.rpartition(":")[2]
    url = f"http://127.0.0.1:{port}/v1/completions"
    assert httpx.post(url, json=LONG, trust_env=False).status_code == 401
    headers = {"authorization": "Bearer the-key"}
    answer = httpx.post(url, json=LONG, headers=headers, trust_env=False, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 300
    assert server.end().code == 0


def test_requests_in_progress_end_before_the_server_does(serve):
    server = serve(2, *TINY)
    expected = server.complete(max_tokens=1000)
    pieces = server.stream(max_tokens=1000)
    text = next(pieces)
    server.ranks()[0].send_signal(signal.SIGTERM)
    server.said("shutting down")
    assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 503
    refused = httpx.post(f"{server.url}/v1/completions", json=LONG, trust_env=False)
    assert refused.status_code == 503
    text += "".join(pieces)
    done = server.wait(60)
    assert done.code == 0 and text == expected, done.err


def test_a_port_in_use_is_said_before_the_model_loads(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = Run(2, "serve", "--port", port, *TINY, directory=tmp_path).wait(60)
    assert done.code == 2
    assert f"port {port} is in use: give another with --port" in done.err
    assert done.err.count("mellmpi:") == 1


@pytest.mark.parametrize(
    "flag",
    [
        ("--port", "70000"),
        ("--host", "no.such.host.example"),
        ("--host", "0.0.0.0"),
        ("--api-key-file", "missing"),
        ("--ssl-certfile", "missing.pem"),
        ("--trace-out", "/no/t"),
        ("--access-log", "missing/log"),
    ],
)
def test_misuse_is_one_line(tmp_path, flag):
    done = Run(1, "serve", *TINY, *flag, directory=tmp_path).wait(60)
    assert done.code == 2 and flag[0] in done.err and "Traceback" not in done.err
