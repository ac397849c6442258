"""A worker drained in the middle of a load, under every policy."""

import random
from dataclasses import replace
from functools import partial

import pytest

from mellmpi.config import BatchConfig, CacheConfig, ClusterConfig
from mellmpi.protocol import DrainWorker, MigrationEnded, UndrainWorker
from mellmpi.scheduler import WorkerState
from mellmpi.scheduler.policies import POLICIES
from mellmpi.sim import Network, Simulation, WorkerSpec
from mellmpi.sim.executor import HashExecutor
from tests.sim.histories import COST, KV, check, random_request

DRAINED_S, EMPTY_S, UNDRAINED_S = 0.02, 0.1, 2.0
WORKERS, REQUESTS = 4, 60


def long_answer(request_id, rng):
    made = random_request(request_id, rng)
    sampling = replace(made.sampling, max_tokens=rng.randint(100, 200), stop_token_ids=())
    return replace(made, sampling=sampling)


def cluster(policy, num_blocks, migrate="auto"):
    """60 requests of 0.1 s or more, all within 0.04 s; worker 1 is drained in their midst."""
    rng = random.Random(5)
    batch = BatchConfig(max_num_seqs=32, max_num_batched_tokens=64)
    spec = WorkerSpec(
        (KV,), num_blocks, batch, CacheConfig(block_size=4), COST.wake_s, partial(HashExecutor)
    )
    config = ClusterConfig(
        policy=policy, migrate=migrate, rebalance_every_s=2e-3, park_after_s=5e-3
    )
    sim = Simulation([spec] * WORKERS, config, COST, Network(1e-4, rng), rng)
    requests = [long_answer(i, rng) for i in range(REQUESTS)]
    for request in requests:
        sim.submit(rng.uniform(0, 2 * DRAINED_S), request)
    sim.operate(DRAINED_S, DrainWorker(1))
    return sim, requests


@pytest.mark.parametrize(
    ("policy", "migrate"),
    [*((policy, "auto") for policy in POLICIES), ("mell", "never"), ("worst_fit", "stress")],
)
def test_no_answer_notices_a_drain_and_the_worker_parks_for_good(policy, migrate):
    sim, requests = cluster(policy, num_blocks=1500, migrate=migrate)
    states = []
    sim.at(EMPTY_S, lambda: states.append(sim.scheduler.registry.ledger.state[1]))
    check(sim, requests)
    assert [a.error for a in sim.outcome.answers] == [""]
    assert sim.scheduler.registry.ledger.state[1] == WorkerState.HELD_PARKED
    assert states == [WorkerState.HELD_PARKED]  # its answers take longer


@pytest.mark.parametrize("policy", ["best_fit", "worst_fit", "frugal"])
def test_under_overload_the_requests_of_a_drained_worker_go_before_the_queue(policy):
    sim, requests = cluster(policy, num_blocks=60)
    queued, held = [], sim.scheduler.registry.ledger
    parked_s = []

    def look():
        queued.append(len(sim.scheduler.queue))
        if held.state[1] == WorkerState.HELD_PARKED and not parked_s:
            parked_s.append(sim.now)

    for i in range(400):
        sim.at(DRAINED_S + i * 1e-3, look)
    sim.operate(UNDRAINED_S, UndrainWorker(1))
    check(sim, requests)
    moves = [e for _, e in sim.outcome.observed if isinstance(e, MigrationEnded) and e.src == 1]
    assert any(move.outcome == "moved" for move in moves)
    assert parked_s and queued[round((parked_s[0] - DRAINED_S) / 1e-3)] > 0  # others wait
