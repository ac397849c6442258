"""`frugal` over time: it follows the load and does not revert its recent decisions."""

import random
from collections import Counter

import pytest

from mellmpi.config import BatchConfig, CacheConfig, ClusterConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import MigrationEnded, ModelKv, Preempted, WorkerChanged
from mellmpi.sim import Network, SilentExecutor, Simulation, WorkerSpec
from tests.scheduler.stage import request

KV = ModelKv("m", block_size=16, block_bytes=16)
COST = CostModel(prefill_token_s=2e-4, step_s=2e-2, decode_token_s=1e-4, link_latency_s=5e-4)
SPEC = WorkerSpec((KV,), 150, BatchConfig(), CacheConfig(), wake_s=0.5, executor=SilentExecutor)


class Run:
    """A run of requests of 100 + 200 tokens, 5 s each, arriving at these times."""

    def __init__(self, *arrivals_s, num_workers=4, num_outputs=200):
        rng = random.Random(0)
        sim = Simulation([SPEC] * num_workers, ClusterConfig(), COST, Network(2e-4, rng), rng)
        for i, at_s in enumerate(arrivals_s):
            sim.submit(at_s, request(i, num_prompt=100, max_tokens=num_outputs))
        self.observed = sim.run().observed
        self.end_s = sim.now
        self.counts = Counter(type(event).__name__ for _, event in self.observed)
        self.moved = [(t, e) for t, e in self.observed if isinstance(e, MigrationEnded)]

    def entered(self, state, after_s=0.0):
        return [
            e.worker
            for t, e in self.observed
            if isinstance(e, WorkerChanged) and e.state == state and t > after_s
        ]

    def active_at(self, time_s):
        states = {}
        for t, event in self.observed:
            if isinstance(event, WorkerChanged) and t <= time_s:
                states[event.worker] = event.state
        return sum(state in ("active", "draining") for state in states.values())


def every(gap_s, start_s, end_s):
    return [start_s + i * gap_s for i in range(int((end_s - start_s) / gap_s))]


def test_a_single_request_keeps_one_worker_and_never_moves():
    run = Run(0.1, num_outputs=400)
    assert not run.moved and not run.entered("waking")
    assert run.active_at(3.0) == 1


def test_under_a_steady_load_the_number_of_workers_is_constant_and_few_requests_move():
    # 5 s of 220 tokens on average, two a second: ten at once, 140 of 150 blocks, and growing.
    arrivals = every(0.5, 0.1, 60.0)
    run = Run(*arrivals)
    assert len(run.entered("waking", 20.0)) <= 1
    assert {run.active_at(t) for t in range(20, 60)} == {2}
    assert len(run.moved) < 0.5 * len(arrivals)


@pytest.mark.parametrize("gap_s", [0.15, 0.2, 0.3, 0.7])
def test_at_any_load_there_are_few_moves_per_request_and_few_wakes(gap_s):
    arrivals = every(gap_s, 0.1, 40.0)
    run = Run(*arrivals)
    assert len(run.moved) < 0.75 * len(arrivals)
    assert len(run.entered("waking")) < 6
    assert run.counts["Preempted"] < 0.05 * len(arrivals)


def test_when_the_load_falls_workers_are_drained_and_stay_parked():
    run = Run(*every(0.15, 0.1, 10.0), *every(2.0, 12.0, 40.0))
    assert run.active_at(9.0) >= 3
    assert run.active_at(20.0) <= 2 and run.active_at(30.0) == 1
    assert not run.entered("waking", 12.0)


def test_when_the_load_rises_workers_are_woken_before_a_request_is_preempted():
    run = Run(*every(2.0, 0.1, 10.0), *every(0.25, 10.0, 30.0))
    assert run.active_at(9.0) == 1 and run.active_at(25.0) > 1
    assert run.counts[Preempted.__name__] == 0
