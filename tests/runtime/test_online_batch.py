"""A batch over HTTP in a job that is killed: the answers of `run-batch`, each line once."""

import json

import openai

from tests.api_server.test_batches import by_id, content, ended, line, start
from tests.runtime.jobs import TINY, Run
from tests.runtime.test_serve import serve  # noqa: F401, a fixture

LINES = [line(number, max_tokens=20 + number % 9, ignore_eos=True) for number in range(40)]
DATA = "".join(json.dumps(entry) + "\n" for entry in LINES).encode()


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_batch_survives_its_job_and_equals_run_batch(serve, tmp_path):  # noqa: F811
    flags = (*TINY, "--batch-dir", str(tmp_path / "batches"))
    server = serve(3, *flags)
    batch = start(client_of(server), DATA)
    folder = tmp_path / "batches" / "files"

    def num_lines():
        return sum(path.read_bytes().count(b"batch_req_") for path in folder.glob("*.jsonl"))

    while num_lines() <= 5:
        assert server.job.poll() is None
    server.kill()
    kept = num_lines()
    assert kept < 40
    server = serve(3, *flags)
    client = client_of(server)
    done = ended(client, batch.id)
    assert done.status == "completed" and done.request_counts.completed == 40 >= kept
    found = by_id(content(client, done.output_file_id))
    server.end()
    (tmp_path / "in.jsonl").write_bytes(DATA)
    files = ("-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"))
    assert Run(3, "run-batch", *files, *TINY, directory=tmp_path).wait(60).code == 0
    assert found == by_id((tmp_path / "out.jsonl").read_bytes())
