"""The operator's commands against a server: what it gets, and what users read when it refuses."""

import socket
import subprocess
import sys
import threading

import pytest

from mellmpi.cli import main
from mellmpi.console.client import Server, ServerProblem
from tests.page.server import FakeServer
from tests.page.snapshots import TWO


@pytest.fixture
def server():
    with FakeServer(lambda: TWO) as server:
        yield server


def unused_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "path", "body", "said"),
    [
        (["drain", "2"], "/v1/cluster/workers/2/drain", {}, "worker 2 hands its requests"),
        (["undrain", "2"], "/v1/cluster/workers/2/undrain", {}, "worker 2 takes requests again"),
        (["migrate", "31", "2"], "/v1/cluster/requests/31/migrate", {"worker": 2}, "request 31"),
        (["loglevel", "debug"], "/v1/cluster/loglevel", {"level": "debug"}, "debug"),
    ],
)
def test_a_command_is_posted_and_told(server, capsys, arguments, path, body, said):
    assert main([*arguments, "--url", server.url]) == 0
    assert server.posted == [(path, body)]
    assert said in capsys.readouterr().out


def test_url_and_key_come_from_the_environment_and_the_command_line_beats_it(server, monkeypatch):
    server.key = "secret"
    monkeypatch.setenv("MELLMPI_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("MELLMPI_API_KEY", "secret")
    assert main(["drain", "1", "--url", server.url]) == 0
    monkeypatch.setenv("MELLMPI_URL", server.url)
    assert main(["undrain", "1"]) == 0
    assert main(["drain", "1", "--api-key", "other"]) == 2


@pytest.mark.parametrize(
    ("given", "said"), [([], "needs a key"), (["--api-key", "x"], "not accept")]
)
@pytest.mark.parametrize("command", [["top", "--once"], ["drain", "1"]])
def test_a_missing_and_a_wrong_key_are_told_apart(server, capsys, command, given, said):
    server.key = "secret"
    assert main([*command, "--url", server.url, *given]) == 2
    error = capsys.readouterr().err
    assert said in error and "MELLMPI_API_KEY" in error and "x" not in error.split()


@pytest.mark.parametrize("command", [["top"], ["drain", "1"]])
def test_without_a_server_users_read_what_to_type(capsys, command):
    assert main([*command, "--url", f"http://127.0.0.1:{unused_port()}"]) == 2
    error = capsys.readouterr().err
    assert "no server answers at http://127.0.0.1:" in error
    assert "python -m mellmpi serve" in error and "--url" in error


def test_a_refusal_has_the_servers_words_without_control_characters(server, capsys):
    server.refusal = (409, "worker 1 is the last \x1b[31mactive one")
    assert main(["drain", "1", "--url", server.url]) == 2
    assert "worker 1 is the last \\x1b[31mactive one (409)" in capsys.readouterr().err


def test_a_failure_of_the_server_is_no_mistake_of_the_user(server, capsys):
    server.refusal = (503, "starting")
    assert main(["drain", "1", "--url", server.url]) == 1
    assert "starting" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["drain"], "WORKER"),
        (["drain", "0"], "no whole number"),
        (["migrate", "1"], "WORKER"),
        (["loglevel", "loud"], "loud"),
        (["--policy", "mell", "drain", "1"], "write the command first"),
        (["top", "--url", "ftp://host"], "no address such as"),
        (["top", "--url", "http://host:99999"], "--url"),
        (["top", "--url", "http://no.such.host.invalid"], "check --url"),
        (["drain", "1", "--api-key", "a\nb"], "--api-key"),
    ],
)
def test_mistakes_on_the_command_line_are_told(capsys, arguments, said):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", b"SSH-2.0\r\n"]
)
def test_another_kind_of_server_is_noticed(answer, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        code = main(["top", "--once", "--url", f"http://127.0.0.1:{listening.getsockname()[1]}"])
        thread.join()
    assert code in (1, 2) and "mellmpi: http://127.0.0.1" in capsys.readouterr().err


def test_a_path_and_a_missing_scheme_are_allowed_in_the_url(server):
    assert Server(f"127.0.0.1:{server.port}").snapshot()["policy"] == "frugal"
    assert Server("https://host/prefix/").url == "https://host/prefix"
    assert Server("http://user:word@host:80").url == "http://host:80"


def test_the_stream_ends_with_the_server():
    with FakeServer(lambda: TWO) as server:
        server.period_s = 0.01
        stream = Server(server.url).snapshots()
        assert next(stream)["policy"] == next(stream)["policy"] == "frugal"
    with pytest.raises((StopIteration, ServerProblem)):
        while True:
            next(stream)


def test_the_commands_load_neither_torch_nor_numpy(server):
    blocked = dict.fromkeys(("torch", "numpy", "mpi4py", "rich"))
    code = (
        f"import sys; sys.modules.update({blocked}); from mellmpi.cli import main; "
        f"sys.exit(main(['drain', '1', '--url', {server.url!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
