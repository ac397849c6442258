"""Files and batches: OpenAI's client, the answers of `run-batch`, restarts, owners, bad input."""

import io
import json
import random
from dataclasses import replace

import httpx2 as httpx
import openai
import pytest

from mellmpi.config import HttpConfig, UsageError
from mellmpi.files import LineReader
from mellmpi.frontend import BatchJob, ServedModel, ServedModels
from mellmpi.frontend.openai import LIMIT
from mellmpi.keys import line_of
from mellmpi.protocol import Emit, Rejected, finish_reason
from mellmpi.runtime.serving.settings import LIMITS, Settings
from tests.api_server.fuzz import damaged
from tests.api_server.serving_cell import END, REFUSED, ServingCell, token_at
from tests.api_server.test_streams import is_replaced, until

COMPLETIONS = "/v1/completions"


def line(number, url=COMPLETIONS, **body):
    body = {"prompt": f"prompt {number}", "max_tokens": 8, "temperature": 0, **body}
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": body}


def jsonl(lines):
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def run_batch(tokenizer, data):
    """The lines that `run-batch` writes, by custom_id."""
    written = []
    model = ServedModel(name="tiny", max_model_len=100_000, vocab_size=512, eos_ids=(END,))
    reader = LineReader(io.BytesIO(data).read)
    job = BatchJob(reader, written.append, ServedModels.of((model, tokenizer)))
    for request in job.requests():
        tokens = [token_at(request, 0)]
        while (reason := finish_reason(request, tokens)) is None:
            tokens.append(token_at(request, len(tokens)))
        job.emit(Emit(request.id, 0, tuple(tokens), (), reason, ()))
    return by_id(b"".join(written))


def by_id(data):
    found = {}
    for text in data.splitlines():
        answer = json.loads(text)
        assert answer["custom_id"] not in found, "answered twice"
        answer["response"]["body"].pop("created", None)
        found[answer["custom_id"]] = answer
    return found


def client_of(cell, key="none"):
    return openai.OpenAI(base_url=f"{cell.url}/v1", api_key=key, max_retries=0)


def upload(client, data):
    return client.files.create(file=("requests.jsonl", data), purpose="batch")


def start(client, data, endpoint=COMPLETIONS, **given):
    file = upload(client, data)
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", **given
    )


def ended(client, batch_id):
    def has_ended():
        return client.batches.retrieve(batch_id).status in (
            "completed",
            "failed",
            "cancelled",
            "expired",
        )

    until(has_ended, 30)
    return client.batches.retrieve(batch_id)


def content(client, file_id):
    return client.files.content(file_id).read() if file_id else b""


@pytest.fixture(scope="module")
def serving(byte_directory, tmp_path_factory):
    directory = tmp_path_factory.mktemp("keyed")
    keys = [line_of("one", "key-one", ["serve"]), line_of("two", "key-two", ["serve"])]
    (directory / "keys").write_text("\n".join(keys) + "\n")
    (directory / "keys").chmod(0o600)
    config = HttpConfig(
        port=0, batch_dir=str(directory / "batches"), api_key_file=str(directory / "keys")
    )
    with ServingCell(byte_directory, tokens_a_step=50, config=config) as cell:
        yield cell


@pytest.fixture(scope="module")
def client(serving):
    return client_of(serving, "key-one")


@pytest.fixture(scope="module")
def other(serving):
    return client_of(serving, "key-two")


def test_every_line_is_answered_as_run_batch_answers_it(client, byte_tokenizer):
    lines = [line(number) for number in range(100)]
    lines += [line(100, n=3, temperature=0.7, seed=1), line(101, max_tokens="many"), {"no": "id"}]
    lines += [line(5), line(102, stop=["a", "b"], max_tokens=200)]
    data = jsonl(lines) + b"\nnonsense\n"
    batch = start(client, data, metadata={"for": "test"})
    assert batch.status == "validating" and batch.metadata == {"for": "test"}
    done = ended(client, batch.id)
    assert (done.status, done.errors) == ("completed", None)
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (106, 102, 4)
    answers = content(client, done.output_file_id).splitlines()
    failures = content(client, done.error_file_id).splitlines()
    assert (len(answers), len(failures)) == (102, 4)
    assert all(json.loads(answer)["error"] is None for answer in answers)
    assert all(json.loads(failure)["error"]["message"] for failure in failures)
    expected = run_batch(byte_tokenizer, jsonl(lines[:101] + lines[-1:]))
    assert by_id(b"\n".join(answers)) == expected


def test_a_batch_of_chats(client):
    chat = "/v1/chat/completions"
    messages = [{"role": "user", "content": "hello"}]
    lines = [{"custom_id": "a", "url": chat, "body": {"messages": messages, "max_tokens": 5}}]
    done = ended(client, start(client, jsonl([*lines, line(1)]), endpoint=chat).id)
    [answer] = map(json.loads, content(client, done.output_file_id).splitlines())
    assert answer["response"]["body"]["object"] == "chat.completion"
    [failure] = map(json.loads, content(client, done.error_file_id).splitlines())
    assert "endpoint" in failure["error"]["message"]  # the line has another URL


def test_files_are_listed_read_and_deleted(client):
    data = jsonl([line(1)])
    first, second = upload(client, data), upload(client, data)
    assert (first.object, first.bytes, first.purpose) == ("file", len(data), "batch")
    assert (first.filename, first.status) == ("requests.jsonl", "processed")
    assert client.files.retrieve(first.id) == first and content(client, first.id) == data
    newest = client.files.list(limit=2)
    assert [file.id for file in newest.data] == [second.id, first.id]
    assert first.id in [file.id for file in client.files.list(limit=1)]  # all pages
    assert client.files.delete(first.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(first.id)


def test_batches_are_listed_newest_first(client):
    made = [start(client, jsonl([line(1)])).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=3).data] == made[::-1]
    behind = client.batches.list(limit=1, after=made[1])
    assert [batch.id for batch in behind.data] == made[:1]
    with pytest.raises(openai.BadRequestError):
        client.batches.list(limit=1000)


def test_another_key_sees_nothing(client, other):
    batch = ended(client, start(client, jsonl([line(1)])).id)
    for file_id in (batch.input_file_id, batch.output_file_id):
        for call in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file_id)
    for call in (other.batches.retrieve, other.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(batch.id)
    with pytest.raises(openai.NotFoundError):
        other.batches.create(
            input_file_id=batch.input_file_id, endpoint=COMPLETIONS, completion_window="24h"
        )
    assert other.files.list().data == [] == other.batches.list().data
    assert content(client, batch.output_file_id)


@pytest.mark.parametrize("name", ["..%2fkeys", "..%2f..%2fkeys", "%00", "x" * 5000, "*", "%ff"])
def test_ids_are_no_paths(serving, name):
    headers = {"authorization": "Bearer key-one"}
    with httpx.Client(base_url=serving.url, headers=headers, trust_env=False) as client:
        assert client.get(f"/v1/batches/{name}").status_code == 404
        assert client.post(f"/v1/batches/{name}/cancel").status_code == 404
        assert client.get(f"/v1/files/{name}").status_code == 404
        assert client.get(f"/v1/files/{name}/content").status_code == 404
        assert client.delete(f"/v1/files/{name}").status_code == 404


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        (b"", "empty_file", "no requests"),
        (b"\n \n", "empty_file", "no requests"),
        (b'[{"custom_id": "1"}]', "invalid_file", "JSON array"),
        (b"PK\x03\x04....", "invalid_file", "zip"),
        (b"\x00" * 1000, "invalid_file", "binary"),
    ],
)
def test_a_file_that_is_not_json_lines_fails_the_batch(client, data, code, says):
    done = ended(client, start(client, data).id)
    assert done.status == "failed" and done.failed_at and done.output_file_id is None
    [error] = done.errors.data
    assert error.code == code and says in error.message


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": None}, "completion_window"),
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "x" * 1000}}, "metadata"),
        ({"output_expires_after": {}}, "output_expires_after"),
    ],
)
def test_a_batch_with_wrong_fields_is_refused(serving, client, changed, param):
    file = upload(client, jsonl([line(1)]))
    body = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    headers = {"authorization": "Bearer key-one"}
    response = httpx.post(f"{serving.url}/v1/batches", json=body | changed, headers=headers)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "given",
    [
        {"json": {}},
        {"content": b"", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"xx", "headers": {"content-type": "multipart/form-data; boundary=a"}},
        {"data": {"purpose": "batch"}},
        {"files": {"purpose": (None, "batch")}},
        {"files": {"file": ("a", b"{}")}},
        {"files": {"file": ("a", b"{}"), "purpose": (None, "fine-tune")}},
        {"files": {"file": (None, "text"), "purpose": (None, "batch")}},
        {"files": [("file", ("a", b"{}")), ("file", ("b", b"{}")), ("purpose", (None, "batch"))]},
        {"files": {"file": ("a", b"\x1f\x8b..."), "purpose": (None, "batch")}},
        {"files": {"file": ("a", b"{}"), "purpose": (None, "batch"), "x": (None, "y")}},
        {"files": {"file": ("a", b"{}"), "purpose": (None, "x" * 10**6)}},
    ],
)
def test_a_wrong_upload_is_refused(serving, client, given):
    before = client.files.list().data
    given = {**given, "headers": {"authorization": "Bearer key-one", **given.get("headers", {})}}
    response = httpx.post(f"{serving.url}/v1/files", **given)
    assert response.status_code == 400 and response.json()["error"]["message"]
    assert client.files.list().data == before


FORM = (
    b'--xx\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n'
    b'Content-Type: application/octet-stream\r\n\r\n{"a": 1}\n\r\n--xx\r\n'
    b'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--xx--\r\n'
)
CHARSETS = ("", "; charset=unicode_escape", "; charset=utf-7", "; charset=base64", "; charset=idna")


def test_damaged_uploads_do_no_harm(serving):
    headers = {"authorization": "Bearer key-one"}
    statuses = set()
    with httpx.Client(base_url=serving.url, headers=headers, trust_env=False) as client:
        for seed in range(200):
            rng = random.Random(seed)
            kind = f"multipart/form-data; boundary=xx{rng.choice(CHARSETS)}"
            data = damaged(FORM, rng)
            response = client.post("/v1/files", content=data, headers={"content-type": kind})
            assert response.status_code in (200, 400), (seed, response.text)
            statuses.add(response.status_code)
        cut = FORM[: FORM.index(b"--xx--")]
        headers = {"content-type": "multipart/form-data; boundary=xx"}
        assert client.post("/v1/files", content=cut, headers=headers).status_code == 400
    assert statuses == {200, 400}


def test_the_name_of_a_file_is_text_only(client):
    name = "../../\u202eevil\n.jsonl"
    file = client.files.create(file=(name, b"{}\n"), purpose="batch")
    assert client.files.retrieve(file.id).filename.isprintable()


def test_a_batch_whose_input_was_deleted_fails(serving, client):
    serving.front.set_state("stalled", "held by the test")
    try:
        batch = start(client, jsonl([line(1)]))
        client.files.delete(batch.input_file_id)
    finally:
        serving.front.set_state("ready", "")
    assert ended(client, batch.id).errors.data[0].code == "file_not_found"


def test_a_refusal_for_ever_fails_its_line_alone(client):
    lines = [line(1), line(2, prompt=[40] * REFUSED)]
    done = ended(client, start(client, jsonl(lines)).id)
    assert (done.request_counts.completed, done.request_counts.failed) == (1, 1)
    [failure] = map(json.loads, content(client, done.error_file_id).splitlines())
    assert failure["custom_id"] == "line-2" and "more than there is" in failure["error"]["message"]


def test_without_a_directory_the_routes_say_which_flag_is_missing(http):
    for path in ("/v1/files", "/v1/batches"):
        response = http.get(path)
        assert response.status_code == 404
        assert "--batch-dir" in response.json()["error"]["message"]


# --- restarts ------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    return HttpConfig(port=0, batch_dir=str(tmp_path / "batches"))


@pytest.fixture
def slow(byte_directory, config):
    with ServingCell(byte_directory, token_s=0.005, config=config) as cell:
        yield cell


def completed(client, batch_id):
    return client.batches.retrieve(batch_id).request_counts.completed


def lines_of(tmp_path):
    """Lines in the output of the only batch."""
    outputs = [p for p in (tmp_path / "batches" / "files").glob("*.jsonl")]
    return sum(path.read_bytes().count(b"batch_req_") for path in outputs)


DATA = jsonl([line(number, max_tokens=4 + number % 7) for number in range(300)])


def test_a_killed_server_continues_and_repeats_no_answer(slow, tmp_path, byte_tokenizer):
    client = client_of(slow)
    batch = start(client, DATA)
    kept = 0
    for _ in range(2):
        until(lambda kept=kept: lines_of(tmp_path) > kept + 20)
        process = slow.server.process
        process.kill()
        process.wait()
        kept = lines_of(tmp_path)
        until(lambda process=process: is_replaced(slow, process))
    done = ended(client_of(slow), batch.id)
    assert done.status == "completed" and done.request_counts.completed == 300
    assert by_id(content(client, done.output_file_id)) == run_batch(byte_tokenizer, DATA)
    assert 300 < slow.submitted <= 300 + 2 * 2 * 64  # answered lines were not asked for again
    assert not slow.open


def test_a_whole_job_continues(byte_directory, config, tmp_path, byte_tokenizer):
    with ServingCell(byte_directory, token_s=0.005, config=config) as cell:
        batch = start(client_of(cell), DATA)
        until(lambda: lines_of(tmp_path) > 20)
    kept = lines_of(tmp_path)
    with ServingCell(byte_directory, token_s=0.001, config=config) as cell:
        done = ended(client_of(cell), batch.id)
        assert cell.submitted == 300 - kept
        found = by_id(content(client_of(cell), done.output_file_id))
    assert found == run_batch(byte_tokenizer, DATA)


def test_a_cancelled_batch_keeps_its_answers(slow, tmp_path):
    client = client_of(slow)
    batch = start(client, DATA)
    until(lambda: lines_of(tmp_path) > 20)
    slow.hold.set()
    asked = client.batches.cancel(batch.id)
    assert asked.status == "cancelling" and asked.cancelling_at
    done = ended(client, batch.id)
    assert done.status == "cancelled" and done.cancelled_at >= done.cancelling_at
    answers = by_id(content(client, done.output_file_id))
    assert 20 < len(answers) < 300 and done.request_counts.completed == len(answers)
    until(lambda: not slow.open and not slow.front._calls.num_open)  # though the model pauses
    slow.hold.clear()
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(batch.id)


def test_a_server_that_shuts_down_begins_no_line(slow, tmp_path):
    client = client_of(slow)
    batch = start(client, DATA)
    until(lambda: lines_of(tmp_path) > 20)
    slow.front.drain()
    until(lambda: slow.front.done)
    assert client.batches.retrieve(batch.id).status == "in_progress"
    assert slow.submitted < 300


def edited(tmp_path, batch_id, **changes):
    """Change the record of a batch, as if time had passed."""
    path = tmp_path / "batches" / "batches" / f"{batch_id}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return json.loads(path.read_text())


def test_a_batch_that_takes_too_long_expires(slow, tmp_path):
    client = client_of(slow)
    slow.front.drain()
    until(lambda: slow.front.done)
    batch = start(client, DATA)
    assert batch.expires_at == batch.created_at + 24 * 3600
    edited(tmp_path, batch.id, expires_at=1)
    slow.front.set_state("ready", "")
    done = ended(client, batch.id)
    assert done.status == "expired" and done.expired_at
    until(lambda: not slow.open)


def test_a_full_disk_fails_the_batch_with_the_reason(slow, tmp_path):
    client = client_of(slow)
    slow.front.drain()
    until(lambda: slow.front.done)
    batch = start(client, jsonl([line(1), {"no": "id"}]))
    failures = edited(tmp_path, batch.id)["failures_id"]
    (tmp_path / "batches" / "files" / f"{failures}.jsonl").symlink_to("/dev/full")
    slow.front.set_state("ready", "")
    done = ended(client, batch.id)
    assert done.status == "failed" and done.errors.data[0].code == "unwritable"
    assert "No space left" in done.errors.data[0].message
    assert str(tmp_path) not in done.errors.data[0].message
    until(lambda: not slow.open)


def test_a_damaged_record_stops_no_other_batch(slow, tmp_path):
    client = client_of(slow)
    client.batches.list()  # makes the directories
    broken = tmp_path / "batches" / "batches" / f"batch_{'0' * 32}.json"
    for text in ("{", "[]", '{"id": 1}', "null"):
        broken.write_text(text)
        done = ended(client, start(client, jsonl([line(1)])).id)
        assert done.status == "completed" and len(client.batches.list().data) > 0


def test_a_request_that_the_scheduler_refuses_for_now_is_sent_again(slow, byte_tokenizer):
    client = client_of(slow)
    slow.hold.set()
    data = jsonl([line(1), line(2, n=2)])
    batch = start(client, data)
    until(lambda: len(slow.open) == 3)
    for request_id in list(slow.open):
        del slow.open[request_id]
        slow.front.deliver(Rejected(request_id, "the queue is too long", 0.2))
    until(lambda: len(slow.open) == 3)
    slow.hold.clear()
    done = ended(client, batch.id)
    assert done.request_counts.failed == 0 and slow.submitted == 6
    assert by_id(content(client, done.output_file_id)) == run_batch(byte_tokenizer, data)


def test_one_of_several_servers_runs_a_batch(byte_directory, config, tmp_path, byte_tokenizer):
    """As with two API servers, each with a scheduler of its own that counts."""
    with (
        ServingCell(byte_directory, token_s=0.005, config=config) as one,
        ServingCell(byte_directory, token_s=0.005, config=config) as two,
    ):
        batch = start(client_of(one), DATA)
        until(lambda: lines_of(tmp_path) > 20)
        assert (one.submitted == 0) != (two.submitted == 0)
        first, second = (one, two) if one.submitted else (two, one)
        assert client_of(second).batches.retrieve(batch.id).status == "in_progress"
        process = first.server.process
        first.front.drain()  # its successor takes no batch
        process.kill()
        done = ended(client_of(second), batch.id)
        assert done.request_counts.completed == 300 and second.submitted > 0
        found = by_id(content(client_of(second), done.output_file_id))
    assert found == run_batch(byte_tokenizer, DATA)


def test_a_line_whose_template_takes_too_long_fails_alone(byte_directory, config, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% if messages[0].content == 'slow' %}{% for i in range(99999) %}"
        "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
    )
    limits = replace(LIMITS, parse_within_s=0.5)
    chat = "/v1/chat/completions"
    lines = [
        {"custom_id": text, "url": chat, "body": {"messages": [{"role": "user", "content": text}]}}
        for text in ("a", "slow", "b")
    ]
    for entry in lines:
        entry["body"]["max_tokens"] = 3
    with ServingCell(byte_directory, config=config, limits=limits, template=template) as cell:
        client = client_of(cell)
        done = ended(client, start(client, jsonl(lines), endpoint=chat).id)
        assert (done.request_counts.completed, done.request_counts.failed) == (2, 1)
        [failure] = map(json.loads, content(client, done.error_file_id).splitlines())
        assert failure["custom_id"] == "slow" and "longer than" in failure["error"]["message"]


def test_a_directory_that_cannot_be_made_is_said_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--batch-dir"):
        Settings(HttpConfig(batch_dir=str(tmp_path / "file" / "batches")))


def test_clients_go_first_and_a_batch_has_few_requests_open(slow):
    client = client_of(slow)
    slow.hold.set()
    batch = start(client, DATA)
    until(lambda: len(slow.open) == 64)
    assert min(request.priority for request in slow.requests) > LIMIT  # of those of clients
    slow.hold.clear()
    assert ended(client, batch.id).status == "completed"
