"""A simulated job that is watched: snapshots of a real scheduler at any simulated time."""

import heapq
import math
import random
from functools import partial
from typing import Any

from mellmpi.config import BatchConfig, CacheConfig, ClusterConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import ModelKv
from mellmpi.runtime.snapshot import JobDescription, Snapshots
from mellmpi.sim import Network, SilentExecutor, Simulation, WorkerSpec
from mellmpi.telemetry import Recent
from tests.scheduler.stage import request

KV = ModelKv("m", block_size=16, block_bytes=368_640)
COST = CostModel(prefill_token_s=2e-4, step_s=2e-2, decode_token_s=1e-4, link_latency_s=1e-2)
UNIX_S = 1_790_000_000.0
WAVE_S = 40.0  # period of the load


class Scene:
    """Requests arrive in waves, so that workers park, wake and hand requests over."""

    def __init__(self, num_workers: int = 4, rate: float = 5.0, seed: int = 0, end_s: float = 300):
        rng = random.Random(seed)
        spec = WorkerSpec((KV,), 150, BatchConfig(), CacheConfig(), 1.5, SilentExecutor)
        network = Network(2e-3, rng)
        self.sim = Simulation([spec] * num_workers, ClusterConfig(), COST, network, rng)
        self.recent = Recent()
        hosts = ["node01"] + [f"node{1 + w // 4:02}" for w in range(num_workers)]
        job = JobDescription("0.1", "frugal", ["smollm2"], hosts, 0.0)
        self._snapshots = Snapshots(self.sim.scheduler, self.recent, job)
        self._watch()
        at_s, id = 0.2, 0
        while at_s < end_s:
            load = 0.55 + 0.45 * math.sin(2 * math.pi * at_s / WAVE_S)
            at_s += rng.expovariate(max(0.1, load) * rate)
            id += 1
            sizes = {"num_prompt": rng.randint(20, 400), "max_tokens": rng.randint(40, 300)}
            self.sim.submit(at_s, request(id, **sizes))
        self.sim.later(0.0, self.sim._tick)

    def _watch(self) -> None:
        scheduler, recent = self.sim.scheduler, self.recent
        handle, tick = scheduler.handle, scheduler.tick

        def commands(now: float, found: Any) -> Any:
            recent.commands(now, found)
            return found

        def observed(source: Any, event: Any, now: float) -> Any:
            recent.observe(now, source, event)
            return commands(now, handle(source, event, now))

        scheduler.handle = observed  # type: ignore[method-assign]
        scheduler.tick = lambda now: commands(now, tick(now))  # type: ignore[method-assign]

    def at(self, now: float, held: frozenset[int] = frozenset()) -> dict[str, Any]:
        """The snapshot at a time, in seconds, which never decreases."""
        sim = self.sim
        while sim._heap and sim._heap[0][0] <= now:
            sim.now, _, action = heapq.heappop(sim._heap)
            action()
        sim.scheduler.registry.ledger.held[list(held)] = True
        return self._snapshots.take(now, UNIX_S + now)


def crowded() -> Scene:
    """64 workers."""
    return Scene(num_workers=64, rate=80.0, end_s=60)


SCENES = {"small": Scene, "crowded": crowded, "busy": partial(Scene, rate=9.0)}
