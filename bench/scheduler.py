"""Can one core carry 100,000 tokens/s of step reports and 500 arrivals/s?

    python bench/scheduler.py [--json FILE]

Simulated workers (the real batch schedulers with a free engine) drive rank 0's cluster scheduler
and metrics. Each worker decodes 50 sequences and reports every step; 7.8 requests per second and
worker arrive, and as many end. Only the CPU time of rank 0 is measured: decoding of messages, the
scheduler with its policy, encoding of commands, and the metrics. No sockets, no MPI.
"""

import argparse
import random
import statistics
import time
from collections import Counter
from dataclasses import replace
from typing import Any

from record import add_json_option, finish

from mellmpi.config import BatchConfig, CacheConfig, ClusterConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import GREEDY, ModelKv, Request, StepReport, Submit, decode, encode
from mellmpi.scheduler import ClusterScheduler
from mellmpi.sim import Network, SilentExecutor, Simulation, WorkerSpec
from mellmpi.telemetry import Metrics

SEQUENCES, TOKENS_PER_S = 50, 100_000 / 64  # per worker
PROMPT, OUTPUT = 100, 200  # tokens per request
STEP_S = SEQUENCES / TOKENS_PER_S
ARRIVALS_PER_S = TOKENS_PER_S / OUTPUT  # per worker: 500 for 64
WARM_S, TIMED_S, REPEATS = 0.5, 2.0, 3  # simulated seconds
WORKERS = (4, 16, 64, 256)
KV = ModelKv("m", block_size=16, block_bytes=16)
MEAN_BYTES = PROMPT + OUTPUT / 2 + 8  # per sequence; half a block of it is unused
ARENA_BLOCKS = int(SEQUENCES * MEAN_BYTES / 0.85 / KV.block_bytes)


class Meter:
    """Wraps the scheduler, and sums up the CPU seconds of each part."""

    def __init__(self, scheduler: ClusterScheduler, start_s: float):
        self.scheduler, self.metrics, self._start_s = scheduler, Metrics(), start_s
        self.seconds: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def handle(self, source: Any, event: Any, now: float) -> Any:
        name = type(event).__name__
        data = encode(event)
        began = time.process_time()
        if not isinstance(event, Submit):  # sent by the front in the same process
            event = decode(data)
        decoded = time.process_time()
        commands = self.scheduler.handle(source, event, now)
        handled = time.process_time()
        if now >= self._start_s:
            self._add("decode", decoded - began)
            self._add(name, handled - decoded)
            self.counts["tokens"] += len(event.tokens) if isinstance(event, StepReport) else 0
        self._after(source, event, commands, now)
        return commands

    def tick(self, now: float) -> Any:
        began = time.process_time()
        commands = self.scheduler.tick(now)
        if now >= self._start_s:
            self._add("tick", time.process_time() - began)
        self._after(None, None, commands, now)
        return commands

    def _after(self, source: Any, event: Any, commands: list[tuple[Any, Any]], now: float) -> None:
        began = time.process_time()
        for destination, command in commands:
            if isinstance(destination, int):
                encode(command)
        encoded = time.process_time()
        self.metrics.observe(now, source, event)
        self.metrics.commands(now, commands)
        if now >= self._start_s:
            self._add("encode", encoded - began)
            self._add("metrics", time.process_time() - encoded)

    def _add(self, part: str, seconds: float) -> None:
        self.seconds[part] += seconds
        self.counts[part] += 1


def request(request_id: int, num_outputs: int) -> Request:
    sampling = replace(GREEDY, max_tokens=num_outputs)
    return Request(request_id, KV.model, tuple(range(PROMPT)), sampling, None, 0, None)


def simulation(num_workers: int, seed: int) -> Simulation:
    """Return a simulation in steady state: the mean number of requests per worker, of all ages."""
    rng = random.Random(seed)
    cost = CostModel(prefill_token_s=0.0, step_s=STEP_S, decode_token_s=0.0, link_latency_s=1e-5)
    batch = BatchConfig(max_num_seqs=64, max_num_batched_tokens=2048)
    spec = WorkerSpec(
        (KV,), ARENA_BLOCKS, batch, CacheConfig(), wake_s=1.0, executor=SilentExecutor
    )
    network = Network(5e-5, rng)
    sim = Simulation([spec] * num_workers, ClusterConfig(policy="frugal"), cost, network, rng)
    sim.report_share = 1.0
    alive = num_workers * SEQUENCES
    for i in range(alive):
        sim.submit(1e-3, request(i, rng.randint(1, OUTPUT)))
    rate, end_s = num_workers * ARRIVALS_PER_S, WARM_S + TIMED_S
    for i in range(int(rate * end_s)):
        sim.submit(1e-3 + i / rate, request(alive + i, OUTPUT))
    return sim


def measure(num_workers: int, seed: int) -> dict[str, float]:
    """Return CPU times of rank 0 in TIMED_S simulated seconds, by part, and the load."""
    sim = simulation(num_workers, seed)
    meter = Meter(sim.scheduler, WARM_S)
    sim.scheduler = meter  # type: ignore[assignment]
    sim.run_until(WARM_S + TIMED_S)
    seconds, counts = meter.seconds, meter.counts
    machine = sum(seconds.values()) - seconds["metrics"] - seconds["encode"] - seconds["decode"]
    tokens, arrivals = counts["tokens"], counts["Submit"]
    report = meter.metrics.report(WARM_S + TIMED_S)
    return {
        "tokens_per_s": tokens / machine,
        "tokens_per_s_with_wire": tokens / (machine + seconds["decode"] + seconds["encode"]),
        "tokens_per_s_with_wire_and_metrics": tokens / sum(seconds.values()),
        "us_per_token": seconds["StepReport"] / tokens * 1e6,
        "us_per_token_decode": seconds["decode"] / tokens * 1e6,
        "us_per_token_metrics": seconds["metrics"] / tokens * 1e6,
        "us_per_arrival": seconds["Submit"] / arrivals * 1e6,
        "us_per_tick": seconds["tick"] / counts["tick"] * 1e6,
        "load_tokens_per_s": tokens / TIMED_S,
        "load_arrivals_per_s": arrivals / TIMED_S,
        "load_share_of_one_core": sum(seconds.values()) / TIMED_S,
        "active_workers_mean": report["active_workers_mean"],
        "migrations": sum(report["migrations"].values()),
        "preemptions": report["preemptions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json_option(parser)
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="sizes to measure")
    args = parser.parse_args()
    runs: dict[int, list[dict[str, float]]] = {n: [] for n in args.workers}
    for seed in range(REPEATS):
        for num_workers in args.workers:
            runs[num_workers].append(measure(num_workers, seed))
    results = {
        num_workers: {key: round(statistics.median(r[key] for r in found), 3) for key in found[0]}
        for num_workers, found in runs.items()
    }
    config = {
        "sequences_per_worker": SEQUENCES,
        "prompt_tokens": PROMPT,
        "output_tokens": OUTPUT,
        "simulated_s": TIMED_S,
        "repeats": REPEATS,
        "policy": "frugal",
        "clock": "CPU time",
    }
    finish(config, {"by_workers": results}, args.json)


if __name__ == "__main__":
    main()
