"""Names of the Hugging Face hub: found in the cache, or refused with advice."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.models import model_directories as models
from tests.models.refusals import PROGRAM


def from_hub(name: str, home: Path, **environment: str) -> str:
    """The output of `resolve` with HF_HOME=home and no internet, or with this environment."""
    env = {**os.environ, "HF_HOME": str(home)} | (environment or {"HF_HUB_OFFLINE": "1"})
    command = [sys.executable, "-c", PROGRAM, name, str(home / "cache")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


ENVIRONMENTS = [
    {"HF_HUB_OFFLINE": "1"},
    {"HF_HUB_OFFLINE": "1", "ALL_PROXY": "socks5h://127.0.0.1:1"},
    {"HF_ENDPOINT": "http://127.0.0.1:9", "ALL_PROXY": "socks5h://127.0.0.1:1"},
    {"HF_ENDPOINT": "http://127.0.0.1:9"},
    {"HF_ENDPOINT": "::nonsense"},
    {"HF_ENDPOINT": "http://127.0.0.1:9", "SSL_CERT_FILE": "/no/such/file"},
]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_hub_name_is_found_in_the_cache_if_the_hub_cannot_be_reached(tmp_path, environment):
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--some-org--some-model"
    snapshot = models.write_model(repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    assert from_hub("some-org/some-model", tmp_path, **environment) == f"found {snapshot}\n"


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        *(("some-org/no-model", environment) for environment in ENVIRONMENTS),
        *((name, ENVIRONMENTS[0]) for name in ("a/b..c", "a/b--c", "a/" + 200 * "b")),
    ],
)
def test_an_unavailable_hub_name_is_refused_on_one_line(tmp_path, name, environment):
    said = from_hub(name, tmp_path, **environment)
    assert said.startswith(f"refused {name} is no directory here") and said.count("\n") == 1


def test_an_unavailable_hub_name_is_refused_with_advice(tmp_path):
    said = from_hub("some-org/no-model", tmp_path)
    assert said.startswith("refused some-org/no-model is no directory here")
    assert "copy the model to this machine and give its directory" in said


@pytest.fixture
def answering():
    """(status, error code of the hub) -> address of a server that answers so."""
    servers = []

    def start(status: int, code: str) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, *arguments):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (401, "GatedRepo", "Accept its terms on the hub, and set HF_TOKEN"),
        (401, "RepoNotFound", "Check the name; if the repository is private, set HF_TOKEN"),
        (404, "RepoNotFound", "Check the name; if the repository is private, set HF_TOKEN"),
        (403, "", "copy the model to this machine"),
        (500, "", "copy the model to this machine"),
    ],
)
def test_an_error_of_the_hub_gives_advice(tmp_path, answering, status, code, advice):
    said = from_hub("some-org/some-model", tmp_path, HF_ENDPOINT=answering(status, code))
    assert said.startswith("refused some-org/some-model is no directory here")
    assert advice in said and said.count("\n") == 1
