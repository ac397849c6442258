"""Seeded fault histories: a small cluster, random load, delays, cancels and up to two crashes.

In half of them an operator drains workers, undrains them and moves requests.
"""

import random
from dataclasses import replace
from functools import partial

from mellmpi.config import BatchConfig, CacheConfig, ClusterConfig
from mellmpi.costs import UNKNOWN, CostModel
from mellmpi.protocol import (
    GREEDY,
    DrainWorker,
    ModelKv,
    MoveRequest,
    Request,
    UndrainWorker,
)
from mellmpi.scheduler.policies import POLICIES
from mellmpi.sim import Network, Simulation, WorkerSpec
from mellmpi.sim.executor import HashExecutor, expected_outputs, logprob, prompt_logprobs

KV = ModelKv("hash", block_size=4, block_bytes=64)
OTHERS = [ModelKv("other", size, block_bytes=64) for size in (4, 6)]
ENGINE = partial(HashExecutor, width=max(kv.block_size for kv in OTHERS))
COST = CostModel(
    prefill_token_s=1e-4, step_s=1e-3, decode_token_s=1e-4, link_latency_s=5e-4, wake_s=5e-3
)


def random_request(request_id: int, rng: random.Random, model: str = KV.model) -> Request:
    stop = (7,) if rng.random() < 0.5 else ()
    sampling = replace(
        GREEDY,
        max_tokens=rng.randint(1, 24),
        seed=rng.randrange(2**64),
        stop_token_ids=stop,
        num_logprobs=rng.choice([None, None, 1]),
        num_prompt_logprobs=1 if request_id % 4 == 3 else None,
    )
    # Few different prefixes, so that some are reused.
    prompt = tuple([rng.randint(0, 2)] * rng.randint(0, 12) + [rng.randint(3, 49)])
    return Request(request_id, model, prompt, sampling, None, 0, None)


def random_sets(
    num_workers: int, crashing: list[int], rng: random.Random
) -> list[tuple[ModelKv, ...]]:
    """Models of each worker: all the same one, or one or both of two. No model dies out."""
    if rng.random() < 0.5:
        return [(KV,)] * num_workers
    other = rng.choice(OTHERS)
    sets = [rng.choice([(KV,), (other,), (KV, other), (other, KV)]) for _ in range(num_workers)]
    staying = rng.choice([w for w in range(1, num_workers + 1) if w not in crashing])
    sets[staying - 1] = (other, KV)
    return sets


def random_history(seed: int, simulation=Simulation) -> tuple[Simulation, list[Request]]:
    """A simulation with all its external events scheduled, and its requests."""
    rng = random.Random(seed)
    num_workers = rng.choice([2, 3, 3, 4])
    crashing = rng.sample(range(1, num_workers + 1), rng.choice([0, 0, 1, min(2, num_workers - 1)]))
    sets = random_sets(num_workers, crashing, rng)
    models = sorted({kv.model for models in sets for kv in models})
    cache = CacheConfig(block_size=4, enable_prefix_caching=rng.random() < 0.4)
    limits = rng.choice([(4, 8), (3, 3), (8, 64)])
    batch = BatchConfig(
        max_num_seqs=limits[0], max_num_batched_tokens=limits[1], target_step_ms=2.0
    )
    num_blocks = rng.choice([10, 14, 24])
    known = COST.step_seconds if seed % 2 else UNKNOWN  # known: time limits steps, too
    specs = [
        WorkerSpec(models, num_blocks, batch, cache, COST.wake_s, ENGINE, known) for models in sets
    ]
    config = ClusterConfig(
        policy=rng.choice(["best_fit", "worst_fit", "frugal", "frugal"]),
        migrate=rng.choice(["auto", "auto", "stress"]),
        seed=seed,
        rebalance_every_s=rng.choice([1e-3, 4e-3]),
        park_after_s=rng.choice([0.0, 5e-3]),
    )
    operator = random.Random(seed)  # draws of its own
    operates = operator.random() < 0.5
    if operates:
        config = replace(config, policy=operator.choice(list(POLICIES)))
    network = Network(rng.choice([1e-5, 5e-4, 5e-3]), rng)
    sim = simulation(specs, config, COST, network, rng)
    requests = [random_request(i, rng, rng.choice(models)) for i in range(rng.randint(4, 12))]
    for request in requests:
        sim.submit(rng.uniform(0, 0.03), request)
        if rng.random() < 0.15:
            sim.cancel(rng.uniform(0, 0.15), request.id)
    if rng.random() < 0.3:
        sim.data_plane.corrupts = lambda: rng.random() < 0.1
    if operates:
        operate(sim, num_workers, len(requests), operator)
    for worker in crashing:
        sim.crash(rng.uniform(0, 0.1), worker)
    return sim, requests


def operate(sim: Simulation, num_workers: int, num_requests: int, rng: random.Random) -> None:
    """Drains, each followed by an undrain, and moves, at random times."""
    for _ in range(rng.randint(1, 3)):
        worker, at_s = rng.randint(1, num_workers), rng.uniform(0, 0.08)
        sim.operate(at_s, DrainWorker(worker))
        sim.operate(at_s + rng.choice([1e-4, 0.01, 0.1]) * rng.random(), UndrainWorker(worker))
    for _ in range(rng.randint(0, 9)):
        move = MoveRequest(rng.randrange(num_requests), rng.randint(1, num_workers))
        sim.operate(rng.uniform(0, 0.04), move)


def check(sim: Simulation, requests: list[Request]) -> None:
    """Run the simulation: every answer is complete and correct, no state is left."""
    outcome = sim.run()
    assert not outcome.rejected, outcome.rejected
    for request in requests:
        outputs, expected = outcome.outputs.get(request.id, []), expected_outputs(request)
        if outcome.finished[request.id] == "cancelled":
            assert outputs == expected[: len(outputs)], f"request {request.id}: wrong before cancel"
        else:
            assert outputs == expected, f"request {request.id}: {outputs} is not {expected}"
        if request.sampling.num_logprobs is not None:
            expected = [logprob(t, len(request.prompt) + i) for i, t in enumerate(outputs)]
            assert outcome.logprobs.get(request.id, []) == expected, f"request {request.id}"
        if request.sampling.num_prompt_logprobs is not None and outputs:
            expected = list(prompt_logprobs(request.prompt[1:], 1))
            assert outcome.prompt_logprobs[request.id] == expected, f"prompt of {request.id}"
    check_no_state_left(sim)


def check_no_state_left(sim: Simulation) -> None:
    assert not sim.scheduler.records and not len(sim.scheduler.queue)
    assert sim.scheduler.queue.kv_bytes == 0 and not sim.scheduler.registry.view.requests.live.any()
    ledger = sim.scheduler.registry.ledger
    assert not ledger.num_requests.any(), ledger.num_requests
    assert not sim.scheduler.registry.prompts.total
    assert not sim.data_plane.sends and not sim.data_plane.receives
    for worker in sim.workers.values():
        if worker.alive:
            batch = worker.batch
            assert not batch.sequences and not batch.lingering, (
                f"worker {worker.id} has sequences left"
            )
            assert batch.pool.num_free == batch.pool.num_blocks, f"worker {worker.id} leaks"
            assert ledger.ordered[worker.id] == 0, f"worker {worker.id}: orders never acknowledged"
