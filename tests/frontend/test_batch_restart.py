"""Batches over files and pipes: restarts, seeds, answers before the end of the input."""

import json
import os
import random

import pytest

from mellmpi.files import Destination, LineReader, descriptor_reader
from mellmpi.frontend import BatchJob, ServedModels
from mellmpi.protocol import Emit
from tests.frontend.batch_run import Run, entry, errors, text_of, texts


@pytest.fixture
def run(tokenizer, model):
    return lambda entries, **options: Run(tokenizer, model, entries, **options)


@pytest.fixture
def go(tmp_path, tokenizer, model):
    """(entries, limit) -> (job, lines of the output) after at most `limit` answers."""
    sink = tmp_path / "out.jsonl"

    def run(entries, limit=None):
        output = Destination("-o", str(sink), str(sink), os.O_RDWR)
        finished = output.resume()
        answers = Run(tokenizer, model, entries, finished=finished)
        answers.job.write = output.append
        for count, request in enumerate(answers.job.requests()):
            if count == limit:
                break
            answers.answer(request)
        os.close(output.descriptor)
        return answers.job, [json.loads(line) for line in sink.read_text().splitlines()]

    run.sink = sink
    return run


def test_a_restart_answers_only_the_remaining_lines(go):
    entries = [entry(str(n)) for n in range(6)]
    _, lines = go(entries, limit=2)
    assert list(texts(lines)) == ["0", "1"]
    with go.sink.open("a") as stream:
        stream.write('{"id": "batch_req_17", "custom_id": "2", "respo')  # killed while writing
    job, lines = go(entries)
    assert [line["custom_id"] for line in lines] == ["0", "1", "2", "3", "4", "5"]
    assert (job.counts.skipped, job.counts.completed) == (2, 4)
    job, lines = go(entries)
    assert len(lines) == 6 and job.done and job.counts.skipped == 6


def test_a_restart_repeats_failed_lines_and_answers_them_once(go):
    entries = [entry("a", model="other"), b"garbage\n", entry("b"), entry("b")]
    _, lines = go(entries)
    assert len(lines) == 4 and len(errors(lines)) == 3
    _, again = go([entry("a"), *entries[1:]])
    assert texts(again) == {"a": ["ih"], "b": ["ih"]} and len(again) == 4
    assert len(errors(again)) == 2


def test_default_seeds_do_not_depend_on_the_order_of_the_lines(go, run):
    entries = [entry(str(n), prompt=f"p{n}") for n in range(9)]
    whole = [request.sampling.seed for request in run(entries).job.requests()]
    mixed = random.Random(0).sample(entries, 9)
    seeds = {
        e["custom_id"]: r.sampling.seed
        for e, r in zip(mixed, run(mixed).job.requests(), strict=True)
    }
    assert [seeds[e["custom_id"]] for e in entries] == whole


def test_requests_of_a_pipe_are_answered_before_it_is_closed(tokenizer, model):
    source, writer = os.pipe()
    reader, sink = os.pipe()
    lines, served = LineReader(descriptor_reader(source)), ServedModels.of((model, tokenizer))
    job = BatchJob(lines, lambda data: os.write(sink, data), served)
    assert list(job.requests()) == [] and not job.exhausted
    os.write(writer, text_of([entry("a", prompt="abc")]))
    (request,) = job.requests()
    job.emit(Emit(request.id, 0, request.prompt, (), "length", ()))
    assert json.loads(os.read(reader, 1 << 16))["custom_id"] == "a"
    assert not job.done
    os.close(writer)
    assert list(job.requests()) == [] and job.done
    for descriptor in (source, reader, sink):
        os.close(descriptor)
