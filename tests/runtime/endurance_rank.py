"""A rank of the long run: `mpirun … python -m tests.runtime.endurance_rank DIRECTORY MOVES`.

A tiny model in float32, greedy and sampled. Requests are long enough for live migration in rounds,
and arenas small enough for preemptions.
"""

import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from mellmpi.config import BatchConfig, CacheConfig, ClusterConfig, Config, ModelConfig
from mellmpi.models import resolve
from mellmpi.protocol import Request
from mellmpi.runtime.connect import connect
from mellmpi.runtime.gpus import GpuAssignment
from mellmpi.runtime.launch import make_worker
from mellmpi.runtime.scheduler import SchedulerLoop
from mellmpi.runtime.worker import Worker
from mellmpi.scheduler import ClusterScheduler
from mellmpi.scheduler.policies import policy_for
from mellmpi.telemetry import Metrics
from mellmpi.transport import LocalNetwork, Transport
from mellmpi.transport.mpi import MpiJob
from tests.mpi.harness import leave_verdict, or_abort
from tests.runtime.cell import ListFront, request
from tests.runtime.endurance import EndlessFront, left, moves

MODEL, VOCABULARY = "random:tiny-llama", 512
CONFIG = Config(
    models=(ModelConfig(model=MODEL, dtype="float32"),),
    cache=CacheConfig(kv_cache_memory_bytes=3 << 20),
    batch=BatchConfig(max_num_seqs=16, max_num_batched_tokens=64),
    cluster=ClusterConfig(migrate="stress", policy="worst_fit", rebalance_every_s=0.005),
    threads=1,
    device="cpu",
)
DRAIN_S = 20.0  # time after the last answer for transfers in flight to end
NUM_REQUESTS, LONGEST = 48, 500


def some_requests() -> list[Request]:
    """Return requests, of which every third is sampled and the others are greedy."""
    rng, drawn = random.Random(0), []
    for i in range(NUM_REQUESTS):
        r = request(i, 0, rng.randint(20, 200), model=MODEL)
        prompt = tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, LONGEST)))
        sampling = replace(r.sampling, temperature=0.8 * (i % 3 == 2))
        drawn.append(replace(r, prompt=prompt, sampling=sampling))
    return drawn


def drive(loop: SchedulerLoop, front: Any, done: Any, run_worker: Any = lambda: False) -> None:
    while not done():
        if not (loop.run_once(front) or run_worker()):
            loop.wait(front)


def unmoved(worker: Worker, transport: Transport) -> dict[int, list[int]]:
    """Return the answers of a single worker in this process."""
    worker.start()
    scheduler = ClusterScheduler(1, ClusterConfig(), policy_for("best_fit", "never"))
    loop = SchedulerLoop(transport, scheduler, Metrics(), time.perf_counter)
    front = ListFront(some_requests())
    drive(loop, front, lambda: front.done, lambda: worker.run_once() or True)
    return front.outputs


class Memory:
    """Samples the memory of this process once per second."""

    def __init__(self) -> None:
        self._process, self._next_s = psutil.Process(), 0.0
        self._rss: list[int] = []

    def sample(self) -> None:
        if (now := time.monotonic()) >= self._next_s:
            self._next_s = now + 1
            self._rss.append(self._process.memory_info().rss)

    def quarters_mb(self) -> list[float]:
        """Return the memory at the start and after each quarter of the time."""
        last = len(self._rss) - 1
        return [round(self._rss[part * last // 4] / 1e6, 1) for part in range(5)]


def schedule(transport: Transport, expected: dict[int, list[int]], num_moves: int) -> Any:
    config, metrics, memory = CONFIG.cluster, Metrics(), Memory()
    scheduler = ClusterScheduler(
        transport.num_workers, config, policy_for(config.policy, config.migrate)
    )
    loop = SchedulerLoop(transport, scheduler, metrics, time.perf_counter)
    drive(loop, None, lambda: not loop.starting())
    rng, requests = random.Random(1), some_requests()

    def draw(request_id: int, rng: random.Random) -> tuple[Request, list[int]]:
        drawn = rng.choice(requests)
        return replace(drawn, id=request_id), expected[drawn.id]

    front = EndlessFront(rng, draw, cancelled=0.02)

    def enough() -> bool:
        memory.sample()
        return moves(metrics) >= num_moves

    began_s = time.monotonic()
    drive(loop, front, enough)
    front.stopped = True
    drive(loop, front, lambda: front.done)
    loop.stop()
    report = metrics.report(time.perf_counter())
    return {
        **front.counts(),
        "moves": report["migrations"],
        "outcomes": report["migration_outcomes"],
        "preemptions": report["preemptions"],
        "migrated_bytes": report["migrated_bytes"],
        "records": len(scheduler.records),
        "seconds": round(time.monotonic() - began_s, 1),
        "in_flight": sum(map(abs, scheduler.registry.in_flight.bytes_between.values())),
        "rss_mb": memory.quarters_mb(),
    }


def work(worker: Worker) -> Any:
    memory = Memory()
    worker.start()
    while not worker.stopped:
        memory.sample()
        if not worker.run_once():
            worker.wait()
    stop_s = time.monotonic() + DRAIN_S
    while left(worker) and time.monotonic() < stop_s:
        worker.run_once()
    return {"left": left(worker), "rss_mb": memory.quarters_mb()}


def num_verdicts() -> int:
    return len(list(Path(sys.argv[1]).glob("*.json")))


def main() -> None:
    job = MpiJob()

    def program() -> None:
        cache_dir = Path(sys.argv[1], "cache")
        prepared = {"directories": [str(resolve(MODEL, cache_dir))], "cache_dir": str(cache_dir)}
        assignment = GpuAssignment(index=0, neighbours=job.size - 1, num_gpus=0)
        if job.rank == 0:
            network = LocalNetwork(1)
            single = make_worker(network.transports[1], CONFIG, prepared, assignment)
            expected = unmoved(single, network.transports[0])
        transport = connect(job, CONFIG)
        if job.rank == 0:
            verdict = schedule(transport, expected, int(sys.argv[2]))
        else:
            worker = make_worker(transport, CONFIG, prepared, assignment)
            verdict = work(worker)
        leave_verdict(job.rank, verdict)
        while job.rank and num_verdicts() < job.size:  # other ranks may still wait for its blocks
            worker.run_once()
        job.finish()

    or_abort(job.rank, job.abort, program)


if __name__ == "__main__":
    main()
