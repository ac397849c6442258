"""The `curl` lines of the README and of the documents, run as they stand."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.api_server.serving_cell import ServingCell

ROOT = Path(__file__).parents[2]
SHOWN = "http://127.0.0.1:8000"  # the server's address in the documents


def curl_lines():
    """Every command in README.md and docs that asks the server."""
    lines = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        lines += [line for line in text.splitlines() if line.startswith("curl ") and SHOWN in line]
    return lines


@pytest.fixture(scope="module")
def short_cell(byte_directory):
    with ServingCell(byte_directory, max_model_len=300) as cell:
        yield cell


@pytest.fixture(scope="module")
def stream_id(short_cell):
    """The id of a stream that has ended, of 64 tokens."""
    body = {"prompt": "abc", "max_tokens": 64, "stream": True}
    with httpx.Client(base_url=short_cell.url, timeout=30, trust_env=False) as client:
        return client.post("/v1/completions", json=body).headers["x-stream-id"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("line", curl_lines())
def test_a_curl_line_is_answered(short_cell, stream_id, line):
    line = line.replace(SHOWN, short_cell.url).replace("$STREAM", stream_id)
    program, *arguments = shlex.split(line)
    found = subprocess.run(
        [program, "--silent", "--show-error", "--fail", "--noproxy", "*", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert found.returncode == 0, found.stderr
    if "-N" in arguments:
        events = [part for part in found.stdout.split("\n\n") if part]
        assert events[-1] == "data: [DONE]" and len(events) > 1
    else:
        assert json.loads(found.stdout)["object"]


def test_the_readme_has_such_lines():
    assert len(curl_lines()) >= 3
