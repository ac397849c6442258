"""Batch files: every line is answered once, and an invalid line affects no other."""

import functools
import json
import pkgutil
from dataclasses import replace

import pytest

from mellmpi.files import LineReader
from mellmpi.frontend import BatchJob, ServedModels
from mellmpi.protocol import Emit, Rejected
from tests.frontend.batch_run import Run, entry, errors, text_of, texts


@pytest.fixture
def run(tokenizer, model):
    return lambda entries, **options: Run(tokenizer, model, entries, **options)


def test_an_answer_has_the_format_of_openais_batches(run):
    (line,) = run([entry(prompt="abc")]).run()
    assert line.keys() == {"id", "custom_id", "response", "error"}
    assert line["custom_id"] == "a" and line["error"] is None
    assert line["id"].startswith("batch_req_")
    response = line["response"]
    assert response["status_code"] == 200 and response["request_id"].startswith("req_")
    assert response["body"]["created"] == 7
    assert response["body"]["choices"][0]["text"] == "cba"


def test_answers_are_written_in_the_order_of_completion(run):
    job = run([entry("a", prompt="abc"), entry("b", prompt="xy")])
    first, second = job.job.requests()
    assert job.job.exhausted and not job.job.done
    job.answer(second)
    assert [line["custom_id"] for line in job.lines] == ["b"] and not job.job.done
    job.answer(first)
    assert [line["custom_id"] for line in job.lines] == ["b", "a"] and job.job.done


def test_requests_are_drawn_one_at_a_time(run):
    job = run([entry("a"), b"garbage\n", entry("b", n=2)]).job
    drawn = job.requests()
    assert next(drawn).id == 1 and job.counts.failed == 0
    assert next(job.requests()).id == 2  # a new iterator continues where the old one stopped
    assert [r.id for r in job.requests()] == [3]


BAD = [
    (b'{"custom_id": "x", \n', "not valid JSON"),
    (b"garbage\n", "not valid JSON"),
    (b"\xff\xfe\x00\x01\x80\n", "not UTF-8 text"),
    (b"[1, 2]\n", "not a JSON object"),
    (b"null\n", "not a JSON object"),
    (b"[" * 100000 + b"\n", "not valid JSON"),
    ({"method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}, "custom_id is missing"),
    (entry(7), "custom_id is missing, or is not a string"),
    (entry(""), "custom_id is missing"),
    (entry("x", url="/v1/embeddings"), "url must be /v1/completions or /v1/chat/completions"),
    (entry("x", method="GET"), "method must be POST, not 'GET'"),
    ({"custom_id": "x", "url": "/v1/completions"}, "body is missing"),
    ({"custom_id": "x", "url": ["u"], "body": {}}, "url must be"),
    ({"custom_id": "x", "url": "/v1/completions", "body": "hi"}, "body is missing, or is not an"),
    (entry("x", model="other"), "the model 'other' does not exist here"),
    (entry("x", prompt="y" * 500), "the prompt alone has 500"),
    (entry("x", max_tokens=-5), "max_tokens must be at least 1, not -5"),
    (entry("x", stream=True), "a batch cannot stream"),
    (entry("x", temperature="hot"), "temperature must be a number"),
    (entry("x", stop="\ud800"), "stop has a lone surrogate"),
    (
        entry(
            "x",
            "/v1/chat/completions",
            prompt=None,
            chat_template_kwargs={"self": 1},
            messages=[{"role": "user", "content": "hi"}],
        ),
        "chat_template_kwargs may not set self",
    ),
]


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_a_bad_line_gets_an_error_and_all_others_complete(run, bad, said):
    lines = run([entry("before"), bad, entry("after")]).run()
    assert texts(lines) == {"before": ["ih"], "after": ["ih"]}
    ((custom_id, message),) = errors(lines)
    assert message.startswith("line 2: ") and said in message
    assert custom_id == ("x" if isinstance(bad, dict) and bad.get("custom_id") == "x" else None)


@pytest.mark.parametrize("odd", [{"messages": None}, {"top_k": 2**64}, {"top_k": 10**400}])
def test_values_without_effect_are_accepted(run, odd):
    lines = run([entry("before"), entry("x", **odd), entry("after")]).run()
    assert texts(lines) == {"before": ["ih"], "x": ["ih"], "after": ["ih"]}


@pytest.mark.parametrize(
    "broken",
    [
        "mellmpi.frontend.batch.parse",
        "mellmpi.frontend.batch.prompt_text",
        "mellmpi.frontend.batch.answer_body",
        "mellmpi.frontend.outputs.Output.take",
    ],
)
def test_an_internal_error_fails_only_the_line_that_it_affects(run, monkeypatch, caplog, broken):
    call, calls = pkgutil.resolve_name(broken), iter(range(99))

    @functools.wraps(call)
    def fails_once(*args):
        if next(calls) == 1:
            raise RuntimeError("a bug")
        return call(*args)

    monkeypatch.setattr(broken, fails_once)
    job = run([entry("a"), entry("b", n=2), entry("c")])
    lines = job.run()
    assert len(lines) == 3 and len(texts(lines)) == 2 and job.job.counts.failed == 1
    ((custom_id, message),) = errors(lines)
    assert "an internal error (RuntimeError: a bug)" in message and repr(custom_id) in caplog.text
    assert [line["response"]["status_code"] for line in lines if line["error"]] == [500]


def test_an_internal_error_of_one_choice_cancels_the_other_choices(run, monkeypatch):
    job = run([entry("a", n=3)])
    first, second, third = job.job.requests()

    def fails(*_):
        raise RuntimeError

    monkeypatch.setattr("mellmpi.frontend.outputs.Output.take", fails)
    assert job.job.emit(Emit(second.id, 0, (1,), (), None, ())) == (first.id, second.id, third.id)
    assert job.job.done and len(errors(job.lines)) == 1


def test_an_internal_error_in_a_last_token_does_not_cancel_that_choice(run, monkeypatch):
    job = run([entry("a", n=2)])
    first, second = job.job.requests()

    def fails(*_):
        raise RuntimeError

    monkeypatch.setattr("mellmpi.frontend.outputs.Output.take", fails)
    assert job.job.emit(Emit(second.id, 0, (1,), (), "length", ())) == (first.id,)


def test_an_error_is_in_the_response_and_beside_it(run):
    (line,) = run([entry(model="other")]).run()
    error = {
        "message": "line 1: the model 'other' does not exist here; this server has 'tiny'",
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert line["error"] == error
    assert line["response"]["status_code"] == 404
    assert line["response"]["body"] == {"error": error}


def test_all_bad_lines_together_leave_the_good_ones_complete(run):
    entries = []
    for index, (bad, _) in enumerate(BAD):
        entries += [bad, entry(f"good-{index}")]
    job = run(entries)
    lines = job.run()
    assert len(texts(lines)) == len(BAD) and len(errors(lines)) == len(BAD)
    assert (job.job.counts.completed, job.job.counts.failed) == (len(BAD), len(BAD))


def test_a_duplicate_custom_id_is_an_error_of_the_later_line(run):
    lines = run([entry("a"), entry("b"), entry("a", prompt="other")]).run()
    assert texts(lines) == {"a": ["ih"], "b": ["ih"]}
    assert errors(lines) == [("a", "line 3: custom_id 'a' was already used on line 1")]


def test_blank_lines_windows_ends_and_a_byte_order_mark_are_harmless(run):
    a, b = json.dumps(entry("a")).encode(), json.dumps(entry("b")).encode()
    job = run([b"\xef\xbb\xbf" + a + b"\r\n\n  \r\n" + b])
    assert texts(job.run()) == {"a": ["ih"], "b": ["ih"]} and job.job.counts.failed == 0


def test_custom_ids_of_any_characters_are_returned_unchanged(run):
    ids = ["né 日本\n\u2028\u2029\x85", "\ud800", '"quoted"', "\x00"]
    assert list(texts(run([entry(i) for i in ids]).run())) == ids


def test_choices_of_one_line_are_written_together(run):
    job = run([entry(prompt=["ab", "c"], n=2)])
    requests = list(job.job.requests())
    for request in reversed(requests):
        assert not job.lines
        job.answer(request)
    assert texts(job.lines) == {"a": ["ba", "ba", "c", "c"]}


def test_a_stop_string_ends_the_text_and_cancels_the_request(run, tokenizer):
    job = run([entry(stop="END", max_tokens=50)])
    (request,) = job.job.requests()
    tokens = tuple(tokenizer.encode("one END two"))
    assert job.job.emit(Emit(request.id, 0, tokens[:5], (), None, ())) == ()
    assert job.job.emit(Emit(request.id, 5, tokens[5:], (), None, ())) == (request.id,)
    (choice,) = job.lines[0]["response"]["body"]["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("one ", "stop")
    assert job.lines[0]["response"]["body"]["usage"]["completion_tokens"] == len("one END")
    late = Emit(request.id, 11, tokens, (), "length", ())  # sent before the cancel
    assert job.job.emit(late) == ()
    assert len(job.lines) == 1


def test_a_stop_string_in_the_last_tokens_needs_no_cancel(run, tokenizer):
    job = run([entry(stop="END")])
    (request,) = job.job.requests()
    tokens = tuple(tokenizer.encode("one END"))
    assert job.job.emit(Emit(request.id, 0, tokens, (), "length", ())) == ()
    assert job.lines[0]["response"]["body"]["choices"][0]["finish_reason"] == "stop"


def test_a_rejected_request_fails_its_line_and_cancels_its_other_choices(run):
    job = run([entry("a", n=3), entry("b")])
    first, second, third, other = job.job.requests()
    job.answer(first)
    assert job.job.rejected(Rejected(second.id, "too long for any worker", 0.0)) == (third.id,)
    assert job.job.rejected(Rejected(third.id, "late", 0.0)) == ()
    assert errors(job.lines) == [("a", "line 1: too long for any worker")]
    job.answer(other)
    assert job.job.done and len(job.lines) == 2


def test_new_text_of_first_choices_is_reported(run):
    grown = []
    job = run([entry("a", prompt="abc", n=2), entry("b", prompt="xy")], on_text=grown.append)
    job.run()
    texts = {"a": "", "b": ""}
    for answer in grown:
        texts[answer.custom_id] += answer.text
    assert texts == {"a": "cba", "b": "yx"} and {answer.prompt for answer in grown} == {"abc", "xy"}


def test_every_line_is_reported_to_the_progress_display(run):
    chat = entry("c", url="/v1/chat/completions")
    chat["body"] = {"messages": [{"role": "user", "content": "say x"}], "max_tokens": 1}
    job = run([entry("a", prompt="abc"), b"bad\n", chat, entry("t", prompt=[70, 71])])
    job.run()
    seen = [(s.number, s.custom_id, s.prompt, s.text, bool(s.error)) for s in job.shown]
    assert seen[:2] == [(1, "a", "abc", "cba", False), (2, None, "", "", True)]
    assert seen[2][2] == "say x" and seen[3][2] == "(token ids)"


def test_a_line_goes_to_the_model_that_it_names_or_else_to_the_first(tokenizer, model):
    other = replace(model, name="other", max_model_len=7)
    served = ServedModels.of((model, tokenizer), (other, tokenizer))
    pieces, written = (
        [
            text_of(
                [
                    entry("a", model="other"),
                    entry("b"),
                    entry("c", model="tiny"),
                    entry("d", model="third"),
                    entry("e", model="other", prompt="too long for it"),
                ]
            ),
            b"",
        ],
        [],
    )
    job = BatchJob(LineReader(lambda: pieces.pop(0)), written.append, served)
    asked = list(job.requests())
    assert [request.model for request in asked] == ["other", "tiny", "tiny"]
    for request in asked:
        job.emit(Emit(request.id, 0, request.prompt, (), "length", ()))
    said = {line["custom_id"]: line["response"] for line in map(json.loads, written)}
    assert said["a"]["body"]["model"] == "other" and said["b"]["body"]["model"] == "tiny"
    assert said["d"]["status_code"] == 404
    assert "this server has 'tiny', 'other'" in said["d"]["body"]["error"]["message"]
    assert said["e"]["status_code"] == 400
