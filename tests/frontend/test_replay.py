import json
from dataclasses import replace

import numpy as np
import pytest

from mellmpi.frontend import ReplayJob, ServedModel
from mellmpi.frontend.replay import SHOWN_REJECTIONS
from mellmpi.protocol import Emit, Rejected
from mellmpi.workload import Workload

MODEL = ServedModel(name="tiny", max_model_len=100, vocab_size=512, eos_ids=(2,))


def workload(*rows):
    arrival_s, prompt, output = zip(*rows, strict=True)
    return Workload(
        np.array(arrival_s),
        np.array(prompt),
        np.array(output),
        ("",) * len(rows),
        ("",) * len(rows),
    )


def job(*rows, seed=0, **given):
    return ReplayJob(workload(*rows), (MODEL,), seed, **given)


def test_lengths_are_those_of_the_trace_and_no_answer_ends_early():
    drawn = list(job((0.0, 7, 3), (1.0, 90, 10)).requests())
    assert [(len(r.prompt), r.sampling.max_tokens) for r in drawn] == [(7, 3), (90, 10)]
    assert all(r.sampling.stop_token_ids == () and max(r.prompt) < 512 for r in drawn)


def test_a_prompt_depends_only_on_seed_and_row():
    rows = (0.0, 7, 3), (1.0, 9, 10)
    first, second = job(*rows).requests()
    assert [first, second] == list(job(*rows).requests())
    assert first.prompt != second.prompt[:7]
    assert next(job(*rows, seed=1).requests()).prompt != first.prompt
    (after_failure,) = job((0.0, 101, 3), rows[1]).requests()
    assert after_failure == second


def test_arrivals_count_from_the_first_and_skip_requests_that_are_too_long():
    arrivals = job((3.0, 7, 3), (4.0, 99, 2), (5.5, 1, 1)).arrivals()
    assert [next(arrivals), next(arrivals)] == [0.0, 2.5]
    next(arrivals)  # callers ask once more than there are requests


def test_requests_that_are_too_long_fail_with_one_message():
    shown, lines = [], []
    replay = job(
        (0.0, 99, 2), (0.0, 1, 1), (0.0, 400, 1), write=lines.append, on_answer=shown.append
    )
    assert len(list(replay.requests())) == 1 and replay.counts.failed == 2
    assert replay.counts.reasons == {"too_long": 2}
    assert len(shown) == 1 and "2 of 3" in shown[0].error and "--length-scale" in shown[0].error
    assert [json.loads(line)["custom_id"] for line in lines] == ["row-1", "row-3"]


def test_a_trace_of_failures_only_ends():
    replay = job((0.0, 99, 2))
    assert not replay.done
    assert not list(replay.requests()) and replay.done


def test_answers_are_lines_of_openais_format_with_token_ids():
    lines = []
    replay = job((0.0, 4, 3), write=lines.append)
    (request,) = replay.requests()
    assert replay.emit(Emit(request.id, 0, (5, 6), (), None, ())) == () and not replay.done
    replay.emit(Emit(request.id, 2, (7,), (), "length", ()))
    assert replay.done and replay.counts.completed == 1
    body = json.loads(lines[0])["response"]["body"]
    assert body["choices"][0]["token_ids"] == [5, 6, 7]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}


def test_rejected_requests_fail_and_only_a_few_are_shown():
    shown = []
    replay = job(*[(0.0, 4, 3)] * 9, on_answer=shown.append)
    for request in list(replay.requests()):
        replay.rejected(Rejected(request.id, "no room for it", 0.0))
    assert replay.done and replay.counts.reasons == {"rejected": 9}
    assert [answer.error for answer in shown] == ["no room for it"] * SHOWN_REJECTIONS


@pytest.mark.parametrize("factor", [0.5, 0.001, 2.0])
def test_lengths_are_scaled_to_at_least_one(factor):
    scaled = workload((0.0, 100, 7), (2.0, 1, 1)).longer(factor)
    assert scaled.prompt_tokens.tolist() == [max(1, round(100 * factor)), max(1, round(factor))]
    assert scaled.output_tokens.min() >= 1 and scaled.arrival_s.tolist() == [0.0, 2.0]


def test_the_first_requests_of_a_trace_are_a_trace():
    few = workload((0.0, 1, 2), (1.0, 3, 4), (2.0, 5, 6)).first(2)
    assert len(few) == 2 and few.output_tokens.tolist() == [2, 4] and len(few.model) == 2


OTHER = ServedModel(name="other", max_model_len=20, vocab_size=8, eos_ids=(2,))


def named(*names):
    return replace(workload(*[(i, 12, 9) for i in range(len(names))]), model=names)


def test_with_several_models_the_trace_names_the_model():
    job = ReplayJob(named("other", "tiny", ""), (MODEL, OTHER), 0)
    asked = {request.id: request for request in job.requests()}
    assert {i: r.model for i, r in asked.items()} == {2: "tiny", 3: "tiny"}
    assert job.counts.reasons == {"too_long": 1}  # 21 tokens; `other` takes 20


def test_a_single_model_answers_whatever_the_trace_names():
    job = ReplayJob(named("gpt-4", ""), (MODEL,), 0)
    assert [r.model for r in job.requests()] == ["tiny", "tiny"]


def test_with_several_models_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="--served-model-name gpt-4"):
        ReplayJob(named("gpt-4"), (MODEL, OTHER), 0)
