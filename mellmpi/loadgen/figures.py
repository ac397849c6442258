"""Figures of a run from its outcomes, under the keys of vLLM's `bench serve`.

Throughputs are over the duration of the run, failed requests included in the time. Latencies are
of completed requests, percentiles are interpolated linearly. An answer of one token has no TPOT.
Without a completed request all figures are 0, as in vLLM.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mellmpi.loadgen.answers import Outcome
from mellmpi.loadgen.options import METRICS
from mellmpi.loadgen.run import Run

NOTABLE_LAG_S = 0.05


def figures(
    run: Run, goodput: Sequence[tuple[str, float]], percentiles: Sequence[float]
) -> dict[str, Any]:
    """Return all figures of a run as a JSON object.

    goodput      (metric, milliseconds): what a request must keep to count as good
    percentiles  0 … 100, of all metrics
    """
    done = [outcome for outcome in run.outcomes if not outcome.reason]
    outputs = sum(outcome.output_tokens for outcome in done)
    inputs = sum(outcome.prompt_tokens for outcome in done)
    duration_s = max(run.duration_s, 1e-9)
    return {
        "duration": run.duration_s,
        "completed": len(done),
        "failed": len(run.outcomes) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration_s,
        "request_goodput": num_good(done, goodput) / duration_s if goodput else None,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
        "max_output_tokens_per_s": float(tokens_per_second(done).max(initial=0.0)),
        "max_concurrent_requests": most_at_once(run.outcomes),
        **_latencies(done, percentiles),
        "interrupted": run.in_flight,
        "tokens_counted_by": dict(Counter(outcome.counted_by for outcome in done)),
        "p99_send_lag_ms": 1000 * p99(run.send_lag_s),
        "p99_loop_lag_ms": 1000 * p99(run.loop_lag_s),
    }


def detailed(run: Run) -> dict[str, Any]:
    """Return the figures of each request, in the order of sending; times in seconds."""
    outcomes = sorted(run.outcomes, key=lambda outcome: outcome.start_s)
    return {
        "input_lens": [outcome.prompt_tokens for outcome in outcomes],
        "output_lens": [outcome.output_tokens for outcome in outcomes],
        "ttfts": [outcome.ttft_s for outcome in outcomes],
        "itls": [list(outcome.itl_s) for outcome in outcomes],
        "start_times": [outcome.start_s for outcome in outcomes],
        "generated_texts": [outcome.text for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }


def samples_s(done: Sequence[Outcome]) -> dict[str, list[float]]:
    """Return all samples of each metric, in seconds."""
    return {
        "ttft": [outcome.ttft_s for outcome in done],
        "tpot": [outcome.tpot_s for outcome in done if outcome.output_tokens > 1],
        "itl": [gap for outcome in done for gap in outcome.itl_s],
        "e2el": [outcome.latency_s for outcome in done],
    }


def _latencies(done: Sequence[Outcome], percentiles: Sequence[float]) -> dict[str, float]:
    found, samples = {}, samples_s(done)
    for metric in METRICS:
        values_ms = 1000 * np.array(samples[metric] or [0.0])
        found[f"mean_{metric}_ms"] = float(values_ms.mean())
        found[f"median_{metric}_ms"] = float(np.median(values_ms))
        found[f"std_{metric}_ms"] = float(values_ms.std())
        for percentile in percentiles:
            found[f"p{percentile:g}_{metric}_ms"] = float(np.percentile(values_ms, percentile))
    return found


def num_good(done: Sequence[Outcome], goodput: Sequence[tuple[str, float]]) -> int:
    """Return how many requests keep all objectives (DistServe, OSDI 2024)."""

    def value_ms(outcome: Outcome, metric: str) -> float:
        values = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s, "e2el": outcome.latency_s}
        return 1000 * values[metric]

    return sum(all(value_ms(one, metric) <= most for metric, most in goodput) for one in done)


def tokens_per_second(done: Sequence[Outcome], bin_s: float = 1.0) -> np.ndarray:
    """Return tokens per second in each bin since the start of the run, float64 [bins].

    Chunks of an answer count alike: an answer of 12 tokens in 4 chunks has 3 in each.
    """
    if not done:
        return np.zeros(0)
    times_s, weights = [], []
    for outcome in done:
        times = outcome.start_s + outcome.ttft_s + np.cumsum([0.0, *outcome.itl_s])
        times_s.append(times)
        weights.append(np.full(len(times), outcome.output_tokens / len(times)))
    bins = (np.concatenate(times_s) / bin_s).astype(int)
    return np.bincount(bins, np.concatenate(weights)) / bin_s


def in_flight(outcomes: Sequence[Outcome]) -> tuple[list[float], list[int]]:
    """Return (times, requests in flight from then on); a request that ends makes room first."""
    changes = [(outcome.start_s, 1) for outcome in outcomes]
    changes += [(outcome.end_s, -1) for outcome in outcomes]
    changes.sort()
    return [t for t, _ in changes], np.cumsum([change for _, change in changes]).tolist()


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """Return the most requests in flight."""
    return max(in_flight(outcomes)[1], default=0)


def failures(outcomes: Sequence[Outcome]) -> str:
    """Return one line on the failed requests, with their most frequent reason; "" if none."""
    failed = [outcome for outcome in outcomes if outcome.reason]
    if not failed:
        return ""
    ((reason, times), *_) = Counter(outcome.reason for outcome in failed).most_common(1)
    example = next(outcome for outcome in failed if outcome.reason == reason)
    shown = f" ({example.detail})" if example.detail else ""
    many = f"{len(failed):,} of {len(outcomes):,} requests failed"
    often = "" if times == len(failed) else f"most often, {times:,} times: "
    return f"{many}: {often}{reason}{shown}"


def lag_warning(run: Run) -> str:
    """Return a warning if the generator itself was late; "" if it was not."""
    send_s, loop_s = p99(run.send_lag_s), p99(run.loop_lag_s)
    if max(send_s, loop_s) <= NOTABLE_LAG_S:
        return ""
    return (
        f"the load generator itself was late: in 1 of 100 cases a request was sent "
        f"{1000 * send_s:.0f} ms after its time or an event waited {1000 * loop_s:.0f} ms; "
        "latencies are too long by as much. Give it a core of its own, or a lower rate"
    )


def p99(values: Sequence[float]) -> float:
    """Return the 99th percentile; 0 without values."""
    found = float(np.percentile(values, 99)) if len(values) else 0.0
    return found if math.isfinite(found) else 0.0
