"""Records, the token log, and the end of an output."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.protocol import finish_reason
from mellmpi.scheduler.requests import (
    Record,
    State,
    TokenLog,
    aligned,
)
from tests.scheduler.stage import request


def test_a_repeated_or_overlapping_run_adds_only_its_end():
    log = TokenLog([5, 6])
    assert log.merge(0, (5, 6)) == () and log.merge(1, (6, 7)) == (7,) and log.tokens == [5, 6, 7]


def test_a_gap_raises():
    with pytest.raises(AssertionError, match="gap: have 1, run starts at 2"):
        TokenLog([5]).merge(2, (6,))


@given(st.lists(st.integers(0, 9), max_size=30), st.data())
def test_the_log_is_the_output_for_any_division_into_runs(output, data):
    log, news = TokenLog(), []
    while len(log.tokens) < len(output):
        first = data.draw(st.integers(0, len(log.tokens)))
        end = data.draw(st.integers(first, len(output)))
        news += log.merge(first, tuple(output[first:end]))
        if end == first:  # so that it ends
            news += log.merge(len(log.tokens), (output[len(log.tokens)],))
        assert log.tokens == news == output[: len(news)]


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ([], None),
        ([1], None),
        ([9], "stop"),
        ([9, 1], None),
        ([1, 2, 3], "length"),
        ([1, 2, 9], "stop"),
    ],
)
def test_an_output_ends_with_a_stop_token_or_at_its_length(outputs, reason):
    assert finish_reason(request(1, max_tokens=3, stop_token_ids=(9,)), outputs) == reason


def test_logprobs_are_those_of_the_new_part_of_a_run_and_stay_empty():
    probs = ((-1.0, (), ()), (-2.0, (), ()))
    assert aligned(probs, 2, 1) == probs[1:] and aligned(probs, 2, 2) == probs
    assert aligned((), 2, 1) == ()


def test_only_an_owned_request_has_an_owner():
    record = Record(request(1), arrival_s=0.0, slot=0)
    with pytest.raises(AssertionError, match="no owner"):
        _ = record.owner
    record.worker, record.epoch = 2, 5
    assert record.owner == (2, 5)


def test_a_bug_lists_the_last_transitions():
    record = Record(request(1), arrival_s=0.0, slot=0)
    for _ in range(50):
        record.move(State.RUNNING, "assigned")
        record.move(State.WAITING, "preempted")
    assert str(record.bug("lost")).startswith("request 1, waiting, epoch None, offer None: lost\n")
    assert str(record.bug("lost")).count("->") == 40
