"""How much do prefills delay decodes, and how much throughput does a shorter step cost?

One worker in this process serves SmolLM2. `--decoding` requests decode; then prompts of
`--prompt-tokens` arrive. The time per output token (TPOT) during their prefill is compared with
that before: with steps limited by time, and by 512 tokens only. Then the throughput of a saturated
batch is measured with both limits.

    python bench/step_target.py --json bench/results/step_target.json
    python bench/step_target.py --cpu avx2 …     hides features beyond AVX2 of an x86 CPU
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import record
from engine_speed import HIDDEN, make_prompts

UNLIMITED_MS = 1e9
LIMITS = {"time": None, "tokens": UNLIMITED_MS}  # --target-step-ms


class Front:
    """Submits requests at given times, and records the time of each token."""

    def __init__(self, arrivals: list[tuple[float, Any]]):
        self._arrivals = sorted(arrivals, key=lambda arrival: arrival[0])
        self._open = {request.id for _, request in arrivals}
        self.times: dict[int, list[float]] = defaultdict(list)
        self.start_s = 0.0

    @property
    def done(self) -> bool:
        return not self._open

    descriptors = ()

    def flush(self) -> None:
        """Do nothing."""

    def inbox(self, now: float) -> list[Any]:
        from mellmpi.protocol import Submit

        due = []
        while self._arrivals and now - self.start_s >= self._arrivals[0][0]:
            due.append(Submit(self._arrivals.pop(0)[1]))
        return due

    def due_s(self, now: float) -> float:
        return 0.0 if self._arrivals else 1.0

    def deliver(self, command: Any) -> None:
        self.times[command.request_id] += [time.perf_counter()] * len(command.tokens)
        if command.finish_reason:
            self._open.discard(command.request_id)


def request(request_id: int, prompt: list[int], num_out: int) -> Any:
    from mellmpi.protocol import GREEDY, Request

    sampling = replace(GREEDY, max_tokens=num_out)
    return Request(request_id, "m", tuple(prompt), sampling, None, 0, None)


class Server:
    """A scheduler and one worker, run alternately."""

    def __init__(self, directory: Path, threads: int, target_step_ms: float | None):
        from mellmpi.config import BatchConfig, CacheConfig, ClusterConfig, ModelConfig
        from mellmpi.engine import build_engine
        from mellmpi.runtime import worker as loops
        from mellmpi.runtime.calibration import measured_steps
        from mellmpi.runtime.scheduler import SchedulerLoop
        from mellmpi.scheduler import ClusterScheduler
        from mellmpi.scheduler.policies import policy_for
        from mellmpi.telemetry import Metrics
        from mellmpi.transport import LocalNetwork

        loops.REPORT_EVERY_S = 0.0  # report every step, so that gaps are those of the steps
        cache = CacheConfig(kv_cache_memory_bytes=1 << 30)
        model = ModelConfig(model=str(directory), served_model_name="m")
        build = partial(
            build_engine,
            [directory],
            [model],
            cache,
            hosted=["m"],
            device="cpu",
            num_threads=threads,
        )
        network = LocalNetwork(1)
        measure = partial(measured_steps, most_positions=8192, clock=time.perf_counter)
        self.worker = loops.Worker(
            network.transports[1],
            build,
            BatchConfig(target_step_ms=target_step_ms),
            cache,
            measure=measure,
        )
        config = ClusterConfig(park_after_s=1e9)
        scheduler = ClusterScheduler(1, config, policy_for("worst_fit", "never"))
        self.loop = SchedulerLoop(network.transports[0], scheduler, Metrics(), time.perf_counter)
        self.worker.start()
        while self.loop.starting():
            self.loop.run_once(None)

    def run(self, front: Front) -> float:
        """Seconds until all requests have finished."""
        front.start_s = began_s = time.perf_counter()
        while not front.done:
            self.loop.run_once(front)
            self.worker.run_once()
        return time.perf_counter() - began_s


def stalls(server: Server, args: argparse.Namespace) -> dict[str, float]:
    """Gaps between tokens of decoding requests in ms, before and during the prefill of prompts."""
    decoding = [
        request(i, p, args.num_out)
        for i, p in enumerate(make_prompts(args.decoding, 64, 1), start=1)
    ]
    long = [
        request(1000 + i, p, 1)
        for i, p in enumerate(make_prompts(args.prompts, args.prompt_tokens, 2))
    ]
    quiet_s = args.quiet_s
    front = Front([(0.0, r) for r in decoding] + [(quiet_s, r) for r in long])
    server.run(front)
    ended_s = max(front.times[r.id][0] for r in long)
    before, during = [], []
    for r in decoding:
        times = front.times[r.id]
        for a, b in itertools.pairwise(times[1:]):
            if b < front.start_s + quiet_s:
                before.append(b - a)
            elif front.start_s + quiet_s < a and b < ended_s:
                during.append(b - a)
    decode_only_ms = 1e3 * statistics.median(before)
    ttft = [front.times[r.id][0] - front.start_s - quiet_s for r in long]
    return {
        "decode_only_ms": decode_only_ms,
        "p50_ms": 1e3 * quantile(during, 0.5),
        "p99_ms": 1e3 * quantile(during, 0.99),
        "max_ms": 1e3 * max(during),
        "p99_over_decode_only": 1e3 * quantile(during, 0.99) / decode_only_ms,
        "gaps": len(during),
        "last_prompt_s": max(ttft),
    }


def saturated(server: Server, args: argparse.Namespace) -> float:
    """Output tokens/s of `--saturated` requests that are submitted at once."""
    prompts = make_prompts(args.saturated, 256, 3)
    requests = [request(i, p, 128) for i, p in enumerate(prompts, start=1)]
    return 128 * len(requests) / server.run(Front([(0.0, r) for r in requests]))


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--cpu", choices=HIDDEN, default="native", help="features of the CPU to use"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decoding", type=int, default=8)
    parser.add_argument("--num-out", type=int, default=700)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--quiet-s", type=float, default=4.0)
    parser.add_argument("--saturated", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache-dir", type=Path, default=Path.home() / ".cache" / "mellmpi")
    record.add_json_option(parser)
    args = parser.parse_args()
    os.environ |= HIDDEN[args.cpu]  # before the first import of mellmpi
    from mellmpi.models import resolve

    directory = resolve("smollm2", args.cache_dir)
    servers = {name: Server(directory, args.threads, ms) for name, ms in LIMITS.items()}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for _ in range(args.rounds):
        for name, server in servers.items():
            row = stalls(server, args) | {"saturated_tokens_per_s": saturated(server, args)}
            rows[name].append(row)
            print(name, {k: round(v, 2) for k, v in row.items()}, file=sys.stderr, flush=True)
    results = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]}
        for name, found in rows.items()
    }
    speeds = [results[name]["saturated_tokens_per_s"] for name in LIMITS]
    results["throughput_of_time_over_tokens"] = speeds[0] / speeds[1]
    record.finish(vars(args) | {"cache_dir": None, "json": None}, results, args.json)


if __name__ == "__main__":
    main()
