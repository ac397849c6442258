"""A batch in any order of events, with restarts at any point: every line is answered once."""

import io
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mellmpi.files import LineReader
from mellmpi.frontend import BatchJob, ServedModel, ServedModels
from mellmpi.frontend.http.batches.store import BatchRecord, Store, record_of
from mellmpi.frontend.http.batches.work import Work
from mellmpi.frontend.openai import parse
from mellmpi.protocol import Emit, Rejected, finish_reason
from tests.api_server.serving_cell import END, token_at
from tests.api_server.test_batches import by_id, jsonl, line

LINES = [line(n, max_tokens=1 + n % 3, n=1 + n % 2) for n in range(12)]
LINES.insert(5, line(50, max_tokens=0.5))
LINES.insert(8, {"no": "id"})
DATA = jsonl(LINES)
GOOD, BAD = 12, 2


class History:
    """A batch whose API server may die; the scheduler's part is played by the test."""

    def __init__(self, directory, served):
        self.store, self.served = Store(directory), served
        self.record = record_of(
            BatchRecord,
            id="batch_" + "0" * 32,
            owner="",
            endpoint="/v1/completions",
            input_file_id="file-" + "1" * 32,
            completion_window="24h",
            expires_at=2**40,
            metadata=None,
            answers_id="file-" + "2" * 32,
            failures_id="file-" + "3" * 32,
            times={},
        )
        self.store.contents(self.record.input_file_id).write_bytes(DATA)
        self.store.save(self.record)
        self.answered = set()
        self.begin()

    def begin(self):
        lock, record = self.store.lock(self.record.id)
        self.lock = lock
        assert self.store.lock(self.record.id) is None
        self.work = Work(self.store, record, self.served, parse)
        self.work.begin()
        self.open, self.done = {}, False

    def die(self, cut):
        """End without warning; the last line may be written in part."""
        self.close()
        path = self.store.contents(self.record.answers_id)
        if cut and (text := path.read_bytes()):
            last = text.splitlines(keepends=True)[-1]
            path.write_bytes(text[: len(text) - min(cut, len(last))])
        self.begin()

    def close(self):
        self.work.close()
        os.close(self.lock)

    def answers(self):
        return self.store.contents(self.record.answers_id).read_bytes()

    def round(self, events, room):
        done = self.work.round(events, room)
        assert len(done.requests) <= max(room, 0)
        for cancel in done.cancels:
            self.open.pop(cancel.request_id, None)
        self.open |= {request.id: (request, []) for request in done.requests}
        self.done = done.is_done

    def step(self, choice, num_tokens):
        """The event of one open request."""
        request, tokens = self.open[sorted(self.open)[choice % len(self.open)]]
        first = len(tokens)
        while len(tokens) - first < num_tokens and finish_reason(request, tokens) is None:
            tokens.append(token_at(request, len(tokens)))
        reason = finish_reason(request, tokens)
        if reason:
            del self.open[request.id]
        return Emit(request.id, first, tuple(tokens[first:]), (), reason, ())


def finish(history, waiting=()):
    while not history.done:
        history.round(waiting, 4)
        waiting = [history.step(0, 3)] if history.open else []


def expected(served):
    written = []
    job = BatchJob(LineReader(io.BytesIO(DATA).read), written.append, served)
    for request in job.requests():
        tokens = []
        while finish_reason(request, tokens) is None:
            tokens.append(token_at(request, len(tokens)))
        job.emit(Emit(request.id, 0, tuple(tokens), (), finish_reason(request, tokens), ()))
    lines = map(json.loads, b"".join(written).splitlines())
    return by_id(jsonl(entry for entry in lines if entry["error"] is None))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("round"), st.integers(0, 5), st.integers(0, 3)),
        st.tuples(st.just("emit"), st.integers(0, 20), st.integers(1, 3)),
        st.tuples(st.just("refuse"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("die"), st.sampled_from([0, 1, 7, 10**6]), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(steps=STEPS)
def test_every_line_is_answered_once_whatever_happens(byte_tokenizer, steps):
    model = ServedModel(name="tiny", max_model_len=100_000, vocab_size=512, eos_ids=(END,))
    served = ServedModels.of((model, byte_tokenizer))
    with TemporaryDirectory() as name:
        history, waiting = History(Path(name), served), []
        for kind, first, second in steps:
            if kind == "die":
                history.die(first)
                waiting = []  # failed lines are tried again
            elif kind == "round":
                history.round(waiting, first)
                waiting = []
            elif history.open and kind == "emit":
                waiting.append(history.step(first, second))
            elif history.open and kind == "refuse":
                request_id = sorted(history.open)[first % len(history.open)]
                del history.open[request_id]
                waiting.append(Rejected(request_id, "it can never be served", 0.0))
        finish(history, waiting)
        history.work.end("completed", ())
        record = history.store.batch(history.record.id, "")
        found = by_id(history.answers())
        history.close()
        wanted = expected(served)
    assert record.status == "completed" and record.total == GOOD + BAD
    assert record.completed == len(found) and record.completed + record.failed == GOOD + BAD
    assert found == {key: wanted[key] for key in found}
    if not any(kind == "refuse" for kind, *_ in steps):
        assert found == wanted and record.failed == BAD


def test_an_end_that_is_cut_off_anywhere_is_repeated(byte_tokenizer, tmp_path, monkeypatch):
    model = ServedModel(name="tiny", max_model_len=100_000, vocab_size=512, eos_ids=(END,))
    served = ServedModels.of((model, byte_tokenizer))
    history = History(tmp_path, served)
    left = 0  # writes of records before the disk is full

    def may_fail(write):
        def run(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError("full")
            return write(*arguments)

        return run

    monkeypatch.setattr(history.store, "save", may_fail(history.store.save))
    monkeypatch.setattr(history.store, "publish", may_fail(history.store.publish))
    for count in range(4):  # "finalizing", two files, the end
        left = 10**9
        finish(history)
        left = count
        with pytest.raises(OSError, match="full"):
            history.work.end("completed", ())
        left = 10**9
        history.die(0)
    finish(history)
    history.work.end("completed", ())
    record = history.store.batch(history.record.id, "")
    assert (record.status, record.completed, record.failed) == ("completed", GOOD, BAD)
    assert by_id(history.answers()) == expected(served)
    files = history.store.files("")
    assert {file.id for file in files} == {record.answers_id, record.failures_id}
    history.close()
