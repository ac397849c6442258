"""No request waits longer than a wake takes for a worker that could be woken."""

import random
from functools import partial

import pytest

from mellmpi.config import BatchConfig, CacheConfig, ClusterConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import ModelKv, Request
from mellmpi.scheduler import WorkerState
from mellmpi.sim import Network, SilentExecutor, Simulation, WorkerSpec
from tests.scheduler.stage import request

MODELS = [ModelKv("a", 16, 16), ModelKv("b", 8, 16)]
COST = CostModel(prefill_token_s=1e-4, step_s=2e-2, decode_token_s=1e-4, link_latency_s=5e-4)
HOSTED = [tuple(MODELS), (MODELS[0],), (MODELS[1],), tuple(MODELS)]
PERIOD_S = 0.1
ENGINE = partial(SilentExecutor, width=16)


class Watched(Simulation):
    """Checks the queue after every rebalancing round."""

    deferred = 0  # rounds in which requests wait and a parked worker is not woken

    def _tick(self) -> None:
        super()._tick()
        registry, queue = self.scheduler.registry, self.scheduler.queue
        for model in queue._by_model:
            able, state = registry.ledger.able(model), registry.ledger.state
            waking = able & (state == WorkerState.WAKING)
            lacking = queue.model_bytes(model) - registry.ledger.capacity[waking].sum()
            if (able & (state == WorkerState.PARKED)).any() and lacking > 0:
                self.deferred += 1
                waited_s = self.now - queue.waiting_since_s(model)
                assert waited_s < registry.view.cost.wake_s, f"{model} waits {waited_s} s"


def random_request(i: int, rng: random.Random) -> Request:
    made = request(i, num_prompt=rng.randint(1, 320), max_tokens=rng.randint(1, 150))
    return Request(i, rng.choice(MODELS).model, made.prompt, made.sampling, None, 0, None)


@pytest.mark.parametrize("policy", ["best_fit", "load_balance", "frugal"])
def test_no_request_waits_longer_than_a_wake_for_a_worker_that_could_be_woken(policy):
    deferred = 0
    for seed in range(8):
        rng = random.Random(seed)
        specs = [WorkerSpec(kvs, 60, BatchConfig(), CacheConfig(), 1.0, ENGINE) for kvs in HOSTED]
        config = ClusterConfig(policy=policy, park_after_s=0.2, rebalance_every_s=PERIOD_S)
        sim = Watched(specs, config, COST, Network(2e-4, rng), rng)
        at_s = 0.5
        for i in range(60):
            at_s += rng.expovariate(rng.choice([0.5, 5.0, 50.0]))
            sim.submit(at_s, random_request(i, rng))
        outcome = sim.run()
        assert len(outcome.finished) == 60
        deferred += sim.deferred
    assert deferred > 0
