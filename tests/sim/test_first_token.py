"""Predicted against actual times to the first token, on workers whose steps take time."""

from dataclasses import replace

import numpy as np
import pytest

from mellmpi.config import BatchConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import ModelKv, Rejected, Submit
from mellmpi.sim import Settings, make_load
from mellmpi.sim.timed import TimedReplay
from mellmpi.workload import gamma

SETTINGS = Settings(thrift=0.5, tick_s=0.1, seed=0, clock=lambda: 0.0, park_after_s=1.0)
COST = CostModel(
    prefill_token_s=1e-4,
    step_s=0.03,
    decode_token_s=5e-4,
    link_Bps=1e6,
    link_latency_s=1e-3,
    wake_s=1.0,
)
SERVED = 8.0  # requests a second that three workers of 4,000 tokens serve


class PredictedReplay(TimedReplay):
    """A replay that notes what is predicted at each Submit, and each refusal."""

    def __init__(self, *args, max_ttft_s):
        super().__init__(*args)
        self.predicted_s, self.refused = {}, {}
        self.scheduler.config = replace(self.scheduler.config, max_ttft_s=max_ttft_s)

    def _to_scheduler(self, source, event):
        if isinstance(event, Submit):
            request, now = event.request, self.clock.now
            predicted_s = self.scheduler.predicted_ttft_s("m", len(request.prompt), now)
            self.predicted_s[request.id] = predicted_s
        super()._to_scheduler(source, event)

    def _observe(self, event, now):
        if isinstance(event, Rejected):
            self.refused[event.request_id] = event
        super()._observe(event, now)


def replay(policy, rate, num_requests, max_ttft_s=None):
    """Returns the replay, and actual and predicted seconds of the accepted requests."""
    workload = gamma(num_requests, rate, cv=1.0, prompt=200, output=150, seed=5)
    load = make_load(workload, {"m": 2}, 8000, 30.0, {"m": 4})
    hosts = [(ModelKv("m", 4, 8),)] * 3
    run = PredictedReplay(load, policy, hosts, COST, BatchConfig(), SETTINGS, max_ttft_s=max_ttft_s)
    ttft_s = run.run(lambda done: None).ttft_s
    actual_s = np.array([ttft_s[i] for i in ttft_s])
    return run, actual_s, np.array([run.predicted_s[i] for i in ttft_s])


@pytest.mark.parametrize("policy", ["frugal", "worst_fit"])
def test_under_light_load_most_predictions_are_within_a_factor_of_two(policy):
    run, actual_s, predicted_s = replay(policy, SERVED / 4, 150)
    ratio = actual_s / predicted_s
    assert 0.8 < np.median(ratio) < 1.25
    assert ((ratio > 0.5) & (ratio < 2.0)).mean() > 0.85
    assert not run.refused


@pytest.mark.parametrize("policy", ["frugal", "worst_fit"])
def test_under_four_times_the_load_accepted_requests_start_near_the_limit(policy):
    run, actual_s, predicted_s = replay(policy, 4 * SERVED, 1200, max_ttft_s=10.0)
    ratio = actual_s / predicted_s
    assert 0.75 < np.median(ratio) < 1.33
    assert (ratio < 2.0).mean() > 0.9 and np.percentile(actual_s, 99) < 1.5 * 10.0
    assert len(actual_s) > 0.2 * 1200  # a quarter could be served
    assert len(run.refused) + len(actual_s) == 1200
    for request_id, refused in run.refused.items():
        assert refused.retry_after_s == pytest.approx(run.predicted_s[request_id] - 10.0)


def test_without_a_limit_the_wait_behind_a_long_queue_is_predicted():
    run, actual_s, predicted_s = replay("worst_fit", 4 * SERVED, 800)
    late = actual_s > 20.0
    ratio = actual_s[late] / predicted_s[late]
    assert not run.refused and late.sum() > 300
    assert 0.65 < np.median(ratio) < 1.35 and ((ratio > 0.5) & (ratio < 2.0)).mean() > 0.9
