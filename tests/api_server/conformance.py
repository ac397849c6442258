"""Requests made from the OpenAPI document, valid and not, to a server with a fake model.

`python -m tests.api_server.conformance [OPTIONS OF schemathesis run]`: fails for a status of 5xx,
an answer that the document does not allow, and an invalid body that is accepted.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mellmpi.config import HttpConfig
from mellmpi.models.random_model import write_byte_tokenizer
from tests.api_server.serving_cell import ServingCell

ENDLESS = "/v1/cluster/events"
# Valid bodies may be refused: a schema knows neither the model nor the grammars that it can follow.
STRICT = "positive_data_acceptance"


ROOT = Path(__file__).resolve().parents[2]


def run(directory, *options):
    """Return the exit code and the output of schemathesis."""
    config = HttpConfig(port=0, batch_dir=str(Path(directory) / "batches"))
    with ServingCell(
        directory, tokens_a_step=50, max_model_len=1000, answer_len=3, config=config
    ) as cell:
        cell.front.questions |= {
            "loglevel": lambda **_: "",
            "snapshot": lambda: "{}",
            "metrics": lambda: json.dumps({"samples": {}, "vllm": False}),
        }
        found = subprocess.run(
            [
                *(sys.executable, "-c", "from schemathesis.cli import schemathesis as s; s()"),
                *("run", f"{cell.url}/openapi.json", "--exclude-path", ENDLESS),
                *("--exclude-checks", STRICT, "--suppress-health-check", "all", "--no-color"),
                *("--request-timeout", "30", *options),
            ],
            cwd=directory,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SCHEMATHESIS_HOOKS": "tests.api_server.conformance_hooks",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        alive = cell.server.process.poll() is None
    return found.returncode or int(not alive), found.stdout


def main():
    with tempfile.TemporaryDirectory() as name:
        write_byte_tokenizer(512, Path(name))
        code, output = run(Path(name), *sys.argv[1:])
    sys.stdout.write(output)
    sys.exit(code)


if __name__ == "__main__":
    main()
