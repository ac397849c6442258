"""Clients that mean harm, or are broken: none of them holds up the others."""

import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import replace

import httpx2 as httpx
import psutil
import pytest

from mellmpi.runtime.serving import front
from mellmpi.runtime.serving.settings import LIMITS
from tests.api_server.serving_cell import ServingCell
from tests.api_server.test_generation import PROMPT
from tests.api_server.test_streams import until

SHORT = replace(LIMITS, head_within_s=0.5, body_within_s=0.7, read_within_s=0.7, parse_within_s=1.0)
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
LOOPS = """{% for m in messages %}{{ m.content }}{% endfor %}
{%- for a in range(turns or 0) %}{% for b in range(turns) %}{% for c in range(turns) %}
{%- endfor %}{% endfor %}{% endfor %}"""


@pytest.fixture(scope="module")
def short(byte_directory, tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "loops.jinja"
    template.write_text(LOOPS)
    with ServingCell(byte_directory, limits=SHORT, template=template) as cell:
        with httpx.Client(base_url=cell.url, timeout=30, trust_env=False) as client:
            until(lambda: client.get("/live").status_code == 200)
        yield cell


@pytest.fixture
def client(short):
    with httpx.Client(base_url=short.url, timeout=30, trust_env=False) as client:
        yield client
        body = {"prompt": PROMPT, "max_tokens": 3}
        assert client.post("/v1/completions", json=body).status_code == 200, "it still serves"
    until(lambda: not short.open and not short.front._calls.num_open)


def connect(cell):
    connection = socket.create_connection(("127.0.0.1", int(cell.url.rpartition(":")[2])), 20)
    connection.settimeout(20)
    return connection


def rest(connection):
    """What the server still sends until it closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            found += data
    return found


def status_of(answer):
    return int(answer.split(b" ", 2)[1])


# --- bodies --------------------------------------------------------------------------------------


def test_a_body_of_100_mb_is_refused_before_it_is_read(short, client):
    with connect(short) as connection:
        connection.sendall(HEAD + b"content-length: 104857600\r\n\r\n" + b" " * 1000)
        assert status_of(connection.recv(1 << 16)) == 413


def test_an_endless_body_is_refused_on_its_way(short, client):
    piece = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    with connect(short) as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(33):
            connection.sendall(piece)
        assert status_of(connection.recv(1 << 16)) == 413
        with contextlib.suppress(ConnectionError):
            for _ in range(10_000):
                connection.sendall(piece)
            pytest.fail("the rest is taken for ever")


def test_a_truncated_body_opens_no_call(short, client):
    submitted = short.submitted
    with connect(short) as connection:
        connection.sendall(HEAD + b'content-length: 100\r\n\r\n{"prompt": "a"}')
        connection.shutdown(socket.SHUT_WR)
        rest(connection)
    assert short.submitted == submitted


def test_a_body_that_does_not_arrive_ends_its_connection(short, client):
    with connect(short) as connection:
        connection.sendall(HEAD + b'content-length: 100\r\n\r\n{"prompt": "a"')
        assert rest(connection) == b""


# --- headers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"POST /v1", HEAD + b"x-slow: 1\r\n"])
def test_headers_that_do_not_arrive_end_their_connection(short, client, sent):
    with connect(short) as connection:
        connection.sendall(sent)
        assert rest(connection) == b""


def test_a_line_break_does_not_hold_an_idle_connection(short, client):
    with connect(short) as connection:
        connection.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(1 << 16)
        connection.sendall(b"\r\n")
        assert status_of(answer) == 200 and rest(connection) == b""


def test_a_byte_now_and_then_does_not_prolong_the_wait(short, client):
    with connect(short) as connection, contextlib.suppress(ConnectionError):
        for byte in HEAD * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
        pytest.fail("the wait for headers has no end")


@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"x-request-id: " + b"a" * (1 << 20) + b"\r\n\r\n",
        HEAD + b"x-a: b\r\n" * 100_000 + b"\r\n",
        HEAD + b"x-a: b\r\n" * 201 + b"content-length: 2\r\n\r\n{}",
        HEAD + b"a" * (1 << 20),
        b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\n\r\n",
        b"GET /" + b"a" * (70 << 10) + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 1000,
    ],
    ids=["id", "many", "201", "name", "path", "long", "tls", "nul"],
)
def test_floods_of_headers_are_refused(short, client, sent):
    with connect(short) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        answer = rest(connection)
    assert not answer or status_of(answer) == 400


# --- readers and connections ---------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_left(byte_directory, stream):
    body = {"prompt": PROMPT, "max_tokens": 90_000, "stream": stream, "logprobs": 5}
    data = json.dumps(body).encode()
    with (
        ServingCell(byte_directory, token_s=0.005, tokens_a_step=200, limits=SHORT) as cell,
        connect(cell) as idle,
    ):
        # Accepted connections inherit it: the kernel must not take what the client does not.
        cell.front._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        idle.close()
        with connect(cell) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(data) + data)
            until(lambda: cell.submitted == 1)
            pid = cell.server.process.pid
            if stream:
                until(lambda: [reason for _, reason in cell.cancelled] == ["gone"], 30)
            else:
                until(lambda: not cell.open, 30)
            until(lambda: not open_connections(pid), 30)
        until(lambda: not cell.open and not cell.front._calls.num_open)


def open_connections(pid):
    """Connections to clients that a process has open."""
    found = psutil.Process(pid).net_connections("tcp")
    return [c for c in found if c.status == psutil.CONN_ESTABLISHED]


def test_a_client_that_reads_slowly_gets_everything(byte_directory):
    body = {"prompt": PROMPT, "max_tokens": 20_000, "logprobs": 5}
    data = json.dumps(body).encode()
    head = HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(data)
    with (
        ServingCell(byte_directory, limits=SHORT, tokens_a_step=1000) as cell,
        connect(cell) as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
        connection.sendall(head + data)
        found = b""
        while part := connection.recv(32 << 10):
            found += part
            time.sleep(0.02)  # the client's speed, not a wait
    answer = json.loads(found.partition(b"\r\n\r\n")[2])
    assert answer["usage"]["completion_tokens"] == 20_000


def test_connections_beyond_the_limit_are_told_so(byte_directory):
    limits = replace(LIMITS, max_connections=3)
    with ServingCell(byte_directory, limits=limits) as cell:
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(connect(cell)) for _ in range(3)]
            for connection in held:
                connection.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
                assert status_of(connection.recv(1 << 16)) == 200
            with connect(cell) as connection:
                head, _, body = rest(connection).partition(b"\r\n\r\n")
            assert status_of(head) == 503 and b"retry-after" in head
            assert json.loads(body)["error"]["code"] == "overloaded"
        until(lambda: not open_connections(cell.server.process.pid))
        assert httpx.get(f"{cell.url}/live", trust_env=False).status_code == 200


# --- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_template_that_loops_is_ended_and_others_are_served(short, client, path):
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "chat_template_kwargs": {"turns": 100_000},
    }
    threads = num_threads(short)
    with connect(short) as connection:
        data = json.dumps(body).encode()
        head = b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        connection.sendall(head % (path.encode(), len(data)) + data)
        until(lambda: num_threads(short) > threads)
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        answer = rest(connection)
    assert status_of(answer) == 400 and b"take longer than 1 s" in answer
    until(lambda: num_threads(short) <= threads)


def num_threads(cell):
    return psutil.Process(cell.server.process.pid).num_threads()


def test_a_server_that_stands_still_is_replaced_and_retries_nothing(byte_directory, monkeypatch):
    monkeypatch.setattr(front, "HUNG_AFTER_S", 2.5)
    with ServingCell(byte_directory) as cell:
        body = {"prompt": PROMPT, "max_tokens": 5}
        with httpx.Client(base_url=cell.url, timeout=30, trust_env=False) as client:
            assert client.post("/v1/completions", json=body).status_code == 200
            hung = cell.server.process
            os.kill(hung.pid, signal.SIGSTOP)
            with pytest.raises(httpx.HTTPError):
                client.post("/v1/completions", json=body)
            assert client.post("/v1/completions", json=body).status_code == 200
        assert cell.server.process.pid != hung.pid and cell.submitted == 2
