"""A step's time limits its prompts, and prompts never starve."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.costs import UNKNOWN, StepBudget, chunk_s
from mellmpi.costs.step_budget import (
    CLOSING_SHARE,
    LEAST_SHARE,
    LEAST_TARGET_S,
    MULTIPLE,
    WITHOUT_DECODES,
)

SECONDS = (
    0.010,
    0.002,
    0.001,
    1e-6,
)  # a step, a prefilled position, a decoded one, an attended one
costs = st.tuples(
    st.floats(1e-4, 1.0), st.floats(1e-6, 0.2), st.floats(1e-6, 0.1), st.floats(0.0, 1e-4)
)


def test_steps_of_unknown_duration_are_limited_by_tokens_alone():
    budget = StepBudget(512)
    assert budget.prompt_s(UNKNOWN, 8) == math.inf
    assert budget.num_tokens(UNKNOWN, 0, math.inf) == 512 == budget.chunk(UNKNOWN, 0, 0)
    assert budget.chunk(UNKNOWN, 0, 12) == 500


def test_a_step_with_decodes_takes_twice_as_long_as_without_prompts_and_at_least_50_ms():
    budget = StepBudget(512)
    assert budget.prompt_s(SECONDS, 40) == pytest.approx((MULTIPLE - 1) * 0.050)
    assert budget.prompt_s(SECONDS, 5) == pytest.approx(LEAST_TARGET_S - 0.015)


def test_prompts_get_more_time_where_they_outnumber_the_decoding_sequences():
    budget = StepBudget(512)
    alone_s = budget.prompt_s(SECONDS, 5)
    assert budget.prompt_s(SECONDS, 5, num_prompts=5) == alone_s
    assert budget.prompt_s(SECONDS, 5, num_prompts=10) == pytest.approx(2 * alone_s)


def test_the_users_target_is_kept():
    assert StepBudget(512, 0.030).prompt_s(SECONDS, 5) == pytest.approx(0.015)


def test_where_decodes_exceed_the_target_prompts_get_their_least_share():
    prompt_s = StepBudget(512, 0.001).prompt_s(SECONDS, 40)
    assert prompt_s / (prompt_s + 0.050) == pytest.approx(LEAST_SHARE)


def test_a_step_without_decodes_may_take_longer():
    prompt_s = StepBudget(512).prompt_s(SECONDS, 0)
    assert prompt_s + 0.010 == pytest.approx(WITHOUT_DECODES * LEAST_TARGET_S)


def test_a_step_in_which_a_request_stops_or_resumes_is_kept_short():
    budget = StepBudget(512)
    short_s = budget.prompt_s(SECONDS, 40, closing=True)
    assert short_s == pytest.approx(0.050 * CLOSING_SHARE / (1 - CLOSING_SHARE))
    assert 0 < short_s < budget.prompt_s(SECONDS, 40)
    short = StepBudget(512, 0.001)
    assert short.prompt_s(SECONDS, 40, closing=True) == short.prompt_s(SECONDS, 40)


@given(costs, st.integers(0, 100_000), st.floats(1e-4, 10.0))
def test_a_chunk_fills_the_time_left_and_no_more(seconds, start, left_s):
    count = StepBudget(10**9).num_tokens(seconds, start, left_s)
    assert count == 1 or chunk_s(seconds, start, count) <= left_s * (1 + 1e-6)
    assert chunk_s(seconds, start, count + 1) >= left_s * (1 - 1e-6)


@given(costs, st.integers(0, 64), st.floats(1e-3, 1.0))
def test_a_step_keeps_its_target_or_gives_prompts_their_share(seconds, num_decoding, target_s):
    budget = StepBudget(512, target_s)
    prompt_s = budget.prompt_s(seconds, num_decoding)
    decode_only_s = seconds[0] + num_decoding * seconds[2]
    assert prompt_s > 0
    if num_decoding:
        share = prompt_s / (prompt_s + decode_only_s)
        assert decode_only_s + prompt_s <= target_s * (1 + 1e-9) or share <= LEAST_SHARE + 1e-9


@pytest.mark.parametrize("max_tokens", [1, 7, 512])
def test_no_chunk_is_larger_than_the_limit_of_tokens(max_tokens):
    assert StepBudget(max_tokens, math.inf).num_tokens(SECONDS, 0, 100.0) == max_tokens
