"""Scheduler and workers in one process, on the local transport, with an engine of hashes.

The cell of these tests is one scheduler with its workers.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mellmpi.config import BatchConfig, CacheConfig, ClusterConfig
from mellmpi.protocol import (
    GREEDY,
    Emit,
    HostedModel,
    ModelKv,
    PromptLogprob,
    Rejected,
    Request,
    Submit,
)
from mellmpi.runtime.scheduler import SchedulerLoop
from mellmpi.runtime.worker import Worker
from mellmpi.scheduler import ClusterScheduler
from mellmpi.scheduler.policies import policy_for
from mellmpi.sim.executor import HashExecutor
from mellmpi.telemetry import Metrics
from mellmpi.transport import LocalNetwork

BLOCK_SIZE = 4
KV = ModelKv("hash", BLOCK_SIZE, block_bytes=64)
TICK_S = 5e-5  # by which each reading advances the clock of a cell


class HashArena:
    """The arena of a HashExecutor for a transport."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.address, self.num_blocks = array.ctypes.data, len(array)
        self.block_bytes, self.device = array[0].nbytes, "cpu"


class HashEngine:
    """Tokens are hashes of the KV that they depend on: wrong blocks give wrong tokens."""

    built = 0
    arithmetic = "hashes"
    warm_up_s = 0.0

    def __init__(self, num_blocks: int, models=(KV,)):
        type(self).built += 1
        self._executor = HashExecutor(num_blocks, models, width=8)
        self.arena = HashArena(self._executor.arena)
        self.models = tuple(HostedModel(kv, f"hash {kv.model}") for kv in models)
        self.released = False

    def execute(self, plan):
        assert not self.released
        return self._executor.execute(plan)

    def release(self):
        self.released = True


class ListFront:
    """Submits requests from a list, and collects their answers in a dict."""

    descriptors = ()

    def __init__(self, requests: list[Request]):
        self._new = [Submit(request) for request in requests]
        self.outputs: dict[int, list[int]] = {request.id: [] for request in requests}
        self.ended: dict[int, str] = {}
        self.prompt_logprobs: dict[int, list[PromptLogprob]] = {i: [] for i in self.outputs}

    @property
    def done(self):
        return len(self.ended) == len(self.outputs)

    def inbox(self, now):
        new, self._new = self._new, []
        return new

    def due_s(self, now):
        return 1e6

    def flush(self):
        pass

    def deliver(self, command):
        match command:
            case Emit(request_id, first, tokens, _, reason, prompt_logprobs):
                assert first == len(self.outputs[request_id])
                self.outputs[request_id] += tokens
                if prompt_logprobs:
                    self.prompt_logprobs[request_id] += prompt_logprobs
                if reason:
                    self.ended[request_id] = reason
            case Rejected(request_id, reason, _):
                self.ended[request_id] = reason


def request(
    request_id: int, num_prompt: int, max_tokens: int, model: str = "hash", **sampling: Any
) -> Request:
    parameters = replace(GREEDY, max_tokens=max_tokens, seed=request_id, **sampling)
    return Request(request_id, model, tuple(range(num_prompt)), parameters, None, 0, None)


def hashing(num_workers: int, num_blocks: int, **cluster) -> "Cell":
    """Return a cell whose workers all run the same hash model."""
    return Cell([partial(HashEngine, num_blocks)] * num_workers, **cluster)


class Cell:
    """Runs the loops of the scheduler and of every worker alternately.

    `builds` make the engines of workers 1, 2, 3 … The clock counts its readings, so that a run does
    not depend on the speed of the machine.
    """

    def __init__(self, builds: Sequence[Callable[[], Any]], **cluster):
        num_workers = len(builds)
        self.network = LocalNetwork(num_workers)
        batch, cache = BatchConfig(max_num_seqs=8), CacheConfig(block_size=BLOCK_SIZE)
        config = ClusterConfig(**{"rebalance_every_s": 1e-4, "park_after_s": 1e-3, **cluster})
        readings = itertools.count()
        clock = lambda: TICK_S * next(readings)  # noqa: E731
        self.workers = {
            w: Worker(self.network.transports[w], build, batch, cache, clock, patience=0.0)
            for w, build in enumerate(builds, start=1)
        }
        self.scheduler = ClusterScheduler(
            num_workers, config, policy_for(config.policy, config.migrate)
        )
        self.metrics = Metrics()
        self.loop = SchedulerLoop(self.network.transports[0], self.scheduler, self.metrics, clock)
        for worker in self.workers.values():
            worker.start()

    def run_once(self, front) -> None:
        self.loop.run_once(front)
        for address, worker in self.workers.items():
            if address not in self.network.lost:
                worker.run_once()

    def run(self, front: ListFront, until=lambda: False, max_iterations: int = 200_000) -> None:
        for _ in range(max_iterations):
            if until() or front.done:
                return
            self.run_once(front)
        raise AssertionError(
            f"requests not finished: {[r.bug('open') for r in self.scheduler.records.values()]}"
        )
