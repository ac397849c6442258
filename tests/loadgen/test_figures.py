"""Figures of runs that are made up, against their definitions written another way."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.loadgen.answers import Outcome
from mellmpi.loadgen.figures import (
    detailed,
    failures,
    figures,
    in_flight,
    lag_warning,
    most_at_once,
    tokens_per_second,
)
from mellmpi.loadgen.run import Run

TIME = st.floats(0, 60)


@st.composite
def outcomes(draw):
    gaps = tuple(draw(st.lists(st.floats(0, 5), max_size=8)))
    ttft_s = draw(TIME)
    return Outcome(
        start_s=draw(TIME),
        prompt_tokens=draw(st.integers(1, 100)),
        latency_s=ttft_s + sum(gaps),
        ttft_s=ttft_s,
        itl_s=gaps,
        output_tokens=draw(st.integers(1, 50)),
        counted_by="usage",
        reason=draw(st.sampled_from(["", "", "", "HTTP 503"])),
    )


RUNS = st.builds(
    Run,
    outcomes=st.lists(outcomes(), max_size=20),
    duration_s=st.floats(0.1, 100),
    sent=st.just(25),
)


@given(RUNS, st.floats(0, 60_000), st.floats(0, 5_000))
def test_figures_are_as_defined(run, ttft_ms, tpot_ms):
    found = figures(run, [("ttft", ttft_ms), ("tpot", tpot_ms)], [50, 99])
    done = [one for one in run.outcomes if not one.reason]
    assert found["completed"] == len(done)
    assert found["failed"] == len(run.outcomes) - len(done)
    assert found["interrupted"] == 25 - len(run.outcomes)
    outputs = sum(one.output_tokens for one in done)
    assert found["request_throughput"] == pytest.approx(len(done) / run.duration_s)
    assert found["output_throughput"] == pytest.approx(outputs / run.duration_s)
    inputs = sum(one.prompt_tokens for one in done)
    assert found["total_token_throughput"] == pytest.approx((inputs + outputs) / run.duration_s)
    good = 0
    for one in done:
        n = one.output_tokens
        tpot_s = (one.latency_s - one.ttft_s) / (n - 1) if n > 1 else 0
        good += 1000 * one.ttft_s <= ttft_ms and 1000 * tpot_s <= tpot_ms
    assert found["request_goodput"] == pytest.approx(good / run.duration_s)
    tpots = [
        1000 * (one.latency_s - one.ttft_s) / (one.output_tokens - 1)
        for one in done
        if one.output_tokens > 1
    ]
    for metric, values in (
        ("ttft", [1000 * one.ttft_s for one in done]),
        ("tpot", tpots),
        ("itl", [1000 * gap for one in done for gap in one.itl_s]),
        ("e2el", [1000 * one.latency_s for one in done]),
    ):
        values = values or [0.0]
        assert found[f"mean_{metric}_ms"] == pytest.approx(statistics.fmean(values), abs=1e-6)
        assert found[f"median_{metric}_ms"] == pytest.approx(statistics.median(values), abs=1e-6)
        assert found[f"std_{metric}_ms"] == pytest.approx(statistics.pstdev(values), abs=1e-6)
        assert found[f"p50_{metric}_ms"] == pytest.approx(statistics.median(values), abs=1e-6)
        assert min(values) <= found[f"p99_{metric}_ms"] + 1e-6 <= max(values) + 2e-6


@given(st.lists(outcomes(), max_size=20), st.sampled_from([0.25, 1.0, 7.0]))
def test_no_token_is_lost_over_time(ended, bin_s):
    total = bin_s * tokens_per_second(ended, bin_s).sum()
    assert total == pytest.approx(sum(one.output_tokens for one in ended))


def test_tokens_are_counted_when_they_come():
    done = Outcome(2.0, 1, 3.0, 1.0, (2.0,), 6)
    assert tokens_per_second([done]).tolist() == [0, 0, 0, 3, 0, 3]


@given(st.lists(outcomes(), max_size=20))
def test_the_most_in_flight_is_found_at_the_start_of_a_request(ended):
    def at_once(now):
        return sum(one.start_s <= now < one.end_s for one in ended)

    expected = max((at_once(one.start_s) for one in ended), default=0)
    longer = [one for one in ended if one.latency_s > 0]
    assert most_at_once(longer) == expected
    assert not ended or in_flight(ended)[1][-1] == 0


def test_the_most_frequent_reason_is_shown_with_an_example():
    failed = [Outcome(0, 1, reason="HTTP 429", detail="slow down")]
    failed += [Outcome(0, 1, reason="HTTP 503", detail=f"full {i}") for i in range(2)]
    said = failures([*failed, Outcome(0, 1)])
    assert said == "3 of 4 requests failed: most often, 2 times: HTTP 503 (full 0)"
    assert failures(failed[:1]) == "1 of 1 requests failed: HTTP 429 (slow down)"
    assert failures([Outcome(0, 1)]) == ""


def test_a_late_generator_is_reported():
    assert lag_warning(Run(send_lag_s=[0.0] * 100, loop_lag_s=[0.04])) == ""
    assert "61 ms after" in lag_warning(Run(send_lag_s=[0.061]))
    assert "waited 90 ms" in lag_warning(Run(loop_lag_s=[0.09]))


def test_requests_are_detailed_in_the_order_of_sending():
    later = Outcome(2.0, 20, 3.0, 1.0, (2.0,), 2, "usage", "a b")
    failed = Outcome(1.0, 10, 0.5, reason="HTTP 500", detail="no")
    assert detailed(Run(outcomes=[later, failed])) == {
        "input_lens": [10, 20],
        "output_lens": [0, 2],
        "ttfts": [0.0, 1.0],
        "itls": [[], [2.0]],
        "start_times": [1.0, 2.0],
        "generated_texts": ["", "a b"],
        "errors": ["HTTP 500: no", ""],
    }
