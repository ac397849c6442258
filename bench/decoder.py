"""A worker's engine that decodes the same requests again and again, without a scheduler."""

import statistics
import time
from dataclasses import replace
from pathlib import Path

from mellmpi.protocol import GREEDY, Chunk, StepPlan
from mellmpi.transport import Transport

REQUESTS, CONTEXT = 8, 500  # decoded in every step; tokens of each
FREE_BLOCKS = 200  # behind those of the requests: 73 MB, 3,200 tokens of the demo model in bf16


class Decoder:
    """REQUESTS requests of the demo model; every step decodes the same position."""

    def __init__(self, num_threads: int):
        from mellmpi.config import CacheConfig, ModelConfig
        from mellmpi.engine import build_executor
        from mellmpi.models import resolve

        directory = resolve("smollm2", Path.home() / ".cache" / "mellmpi")
        self.executor = build_executor(
            directory,
            ModelConfig(model="smollm2"),
            CacheConfig(kv_cache_memory_bytes=512 << 20),
            device="cpu",
            num_threads=num_threads,
        )
        greedy = replace(GREEDY, max_tokens=999)
        used = -(-CONTEXT // 16)
        self.plan = StepPlan(
            self.executor.models[0].kv.model,
            tuple(
                Chunk(
                    i,
                    CONTEXT - 1,
                    (100 + i,),
                    list(range(i * used, (i + 1) * used)),
                    greedy,
                    ((1,), []),
                )
                for i in range(REQUESTS)
            ),
            (),
        )
        self.free_blocks = list(range(REQUESTS * used, REQUESTS * used + FREE_BLOCKS))
        self.steps: list[float] = []

    def step(self) -> bool:
        started_s = time.perf_counter()
        self.executor.execute(self.plan)
        self.steps.append(time.perf_counter() - started_s)
        return True

    def mean_s(self, transport: Transport, num_steps: int) -> float:
        """Mean time of some steps in the loop of a worker without transfers."""
        self.steps.clear()
        for _ in range(num_steps):
            transport.poll()
            transport.progress()
            self.step()
        return statistics.mean(self.steps)
