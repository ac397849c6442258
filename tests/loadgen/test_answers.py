"""What is measured of one answer, from events with given times."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.loadgen.answers import Answer, Failed, message_of

GAP = st.floats(0, 10)


def event(**fields):
    return json.dumps(fields)


def text(content, finish=None):
    return event(choices=[{"text": content, "finish_reason": finish}])


def delta(content, finish=None):
    return event(choices=[{"delta": content, "finish_reason": finish}])


def usage(prompt, completion):
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


def answered(events, start_s=0.0, prompt_tokens=5, count=None):
    """The outcome of (data, time) pairs."""
    answer = Answer()
    for data, now in events:
        answer.take(data, now)
    return answer.outcome(start_s, prompt_tokens, count)


@given(
    start_s=st.floats(0, 1000),
    first_s=GAP,
    gaps=st.lists(GAP, max_size=20),
    extra=st.integers(0, 50),
)
def test_times_are_those_of_the_events(start_s, first_s, gaps, extra):
    times = [start_s + first_s]
    for gap in gaps:
        times.append(times[-1] + gap)
    events = [(text("a"), now) for now in times]
    tokens = len(times) + extra  # some chunks have several tokens
    last = [(text("", "stop"), times[-1] + 1.0), (usage(9, tokens), times[-1] + 2.0)]
    found = answered([*events, *last, ("[DONE]", times[-1] + 3.0)], start_s)
    assert found.ttft_s == times[0] - start_s
    assert found.latency_s == times[-1] + 1.0 - start_s
    assert len(found.itl_s) == len(gaps)
    assert sum(found.itl_s) == pytest.approx(times[-1] - times[0], abs=1e-9)
    assert (found.prompt_tokens, found.output_tokens) == (9, tokens)
    expected = (found.latency_s - found.ttft_s) / (tokens - 1) if tokens > 1 else 0
    assert found.tpot_s == pytest.approx(expected, abs=1e-12)


def test_a_role_alone_is_no_first_token():
    role = delta({"role": "assistant", "content": ""})
    found = answered([(role, 1.0), (delta({"content": "a"}), 3.0), (delta({}, "stop"), 4.0)])
    assert (found.ttft_s, found.latency_s, found.itl_s) == (3.0, 4.0, ())


def test_reasoning_and_tool_calls_are_text():
    call = {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
    events = [
        (delta({"reasoning_content": "so ", "reasoning": "so "}), 1.0),
        (delta(call), 2.0),
        (delta({"content": "done"}, "stop"), 4.0),
    ]
    found = answered(events)
    assert found.text == 'so f{"a": 1}done' and found.itl_s == (1.0, 2.0)


def test_tokens_are_counted_by_the_server_else_the_tokenizer_else_by_chunks():
    events = [(text("a b"), 1.0), (text(" c"), 2.0), ("[DONE]", 3.0)]
    by_words = lambda content: len(content.split())  # noqa: E731
    assert answered([*events, (usage(1, 8), 3.0)], count=by_words).output_tokens == 8
    found = answered(events, count=by_words)
    assert (found.output_tokens, found.counted_by) == (3, "tokenizer")
    found = answered(events)
    assert (found.output_tokens, found.counted_by) == (2, "chunks")
    assert found.prompt_tokens == 5


def test_the_newest_usage_counts_and_null_changes_nothing():
    running = event(choices=[{"text": "a"}], usage={"prompt_tokens": 3, "completion_tokens": 1})
    null = event(choices=[{"text": "", "finish_reason": "stop"}], usage=None)
    found = answered([(running, 1.0), (usage(3, 2), 2.0), (null, 3.0)])
    assert (found.prompt_tokens, found.output_tokens) == (3, 2)


def test_a_usage_that_is_no_number_is_ignored():
    odd = event(choices=[], usage={"prompt_tokens": "3", "completion_tokens": True})
    found = answered([(text("a", "stop"), 1.0), (odd, 2.0)])
    assert (found.prompt_tokens, found.output_tokens, found.counted_by) == (5, 1, "chunks")


def test_a_finish_reason_is_kept_when_more_follows():
    assert answered([(text("a", "stop"), 1.0), (text(""), 2.0)]).latency_s == 2.0


def test_an_answer_without_text_has_its_end_as_first_token():
    found = answered([(text("", "stop"), 2.0), (usage(3, 1), 2.0)])
    assert (found.ttft_s, found.latency_s, found.output_tokens) == (2.0, 2.0, 1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("{", "an event is not JSON"),
        ("[" * 10_000, "an event is not JSON"),
        ("7", "an event is no OpenAI chunk"),
        ("[]", "an event is no OpenAI chunk"),
        (event(choices=3), "an event is no OpenAI chunk"),
        (event(choices=["x"]), "an event is no OpenAI chunk"),
        (event(choices=[{"delta": {"content": 3}}]), "an event is no OpenAI chunk"),
        (event(choices=[], usage=[1]), "an event is no OpenAI chunk"),
        (event(error={"message": "full", "code": 503}), "error in the answer"),
        (event(error="full"), "error in the answer"),
    ],
)
def test_an_event_of_another_kind_is_a_failure(data, reason):
    with pytest.raises(Failed) as caught:
        Answer().take(data, 0.0)
    assert caught.value.reason == reason


def test_a_stream_without_an_end_is_a_failure():
    with pytest.raises(Failed, match="ended early"):
        answered([(text("a"), 1.0)])
    with pytest.raises(Failed, match="without a choice"):
        answered([("[DONE]", 1.0)])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ({"message": "m", "type": "t"}, "m"),
        ({"error": {"message": "m"}}, "m"),
        ("m", "m"),
        ({"detail": "m"}, '{"detail": "m"}'),
        (None, "null"),
    ],
)
def test_the_message_of_an_error_is_found_in_any_form(error, message):
    assert message_of(error) == message
