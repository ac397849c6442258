"""Do a simulated run and a real one agree? One trace, replayed in both; cost model from the real.

The real runs are `run-batch --replay` on this host, with steps that take as long as a GPU's
(paced.py). Each is simulated with the costs fitted to its own report: steps, transfers and wakes;
workers come up when the real ones did. The simulator drives the same two state machines. Compared
are mean active workers (within 5 %) and migrations (within 20 %), medians over the runs.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import ROOT, add_json_option, finish
from rich.console import Console
from rich.table import Table

from mellmpi.config import Config
from mellmpi.costs import CostModel
from mellmpi.frontend import ReplayJob, ServedModel
from mellmpi.protocol import Emit, ModelKv, Rejected, Request
from mellmpi.runtime.worker import REPORT_EVERY_S
from mellmpi.sim import Network, SilentExecutor, Simulation, SimWorker, WorkerSpec
from mellmpi.telemetry import Metrics
from mellmpi.workload import Workload, gamma, load

BARS = {"active_workers_mean": 0.05, "migrations": 0.20}
SHAPE = {  # tiny; 1 KiB of KV a token in float32
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MESSAGE_S = 3e-4  # from one process of a host to another, when the other is about to look


class Observed:
    """The cluster scheduler, and the metrics of all that passes it, as in the runtime's loop."""

    def __init__(self, scheduler: Any, num_requests: int):
        self._scheduler, self.records = scheduler, scheduler.records
        self._metrics, self._left, self.report = Metrics(), num_requests, {}

    def handle(self, source: Any, event: Any, now: float) -> Any:
        self._metrics.observe(now, source, event)
        return self._seen(self._scheduler.handle(source, event, now), now)

    def tick(self, now: float) -> Any:
        return self._seen(self._scheduler.tick(now), now)

    def _seen(self, commands: Any, now: float) -> Any:
        for destination, command in commands:
            self._metrics.command(now, destination, command)
            over = isinstance(command, Rejected) or getattr(command, "finish_reason", None)
            self._left -= bool(over and isinstance(command, Emit | Rejected))
        if not self._left and not self.report:
            self.report = self._metrics.report(now)
        return commands


class AsMeasured(Simulation):
    """Blocks take what was measured, and workers report as the real ones do."""

    block_bytes = 0

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._reported_s = dict.fromkeys(self.workers, 0.0)

    def start(self, ready_s: list[float]) -> None:
        """Workers are up at these times, not all at once."""
        self._heap.clear()
        for worker, at_s in zip(self.workers.values(), ready_s, strict=True):
            self.at(at_s, lambda w=worker: self._to_scheduler(w.id, w.wake()))

    def _block_s(self) -> float:
        return self.block_bytes / self.cost.link_Bps

    def _turn(self, worker: SimWorker) -> None:
        # As the real loop: with the first step after 20 ms, or with nothing to do.
        due = self.now - self._reported_s[worker.id] >= REPORT_EVERY_S
        self.report_share = 1.0 if due else 0.0
        if due:
            self._reported_s[worker.id] = self.now
        super()._turn(worker)


def arena(report: dict[str, Any]) -> tuple[ModelKv, int]:
    """The blocks of its one model, and how many a worker has."""
    ((name, kv),) = report["worker_kv"]["models"].items()
    block_bytes = kv["block_bytes"]
    return (
        ModelKv(name, kv["block_size"], block_bytes),
        report["worker_kv"]["capacity_bytes"] // block_bytes,
    )


def simulated(
    report: dict[str, Any], requests: list[tuple[float, Request]], seed: int
) -> dict[str, Any]:
    """The same requests on simulated workers that cost what the real ones did."""
    config, (kv, num_blocks) = Config.from_dict(report["config"]), arena(report)
    cost = CostModel.fitted(report["costs"])
    spec = WorkerSpec(
        (kv,),
        num_blocks,
        config.batch,
        config.cache,
        cost.wake_s,
        SilentExecutor,
        cost.step_seconds,
    )
    rng = random.Random(seed)
    sim = AsMeasured([spec] * report["workers"], config.cluster, cost, Network(MESSAGE_S, rng), rng)
    sim.block_bytes, sim.max_events = kv.block_bytes, 10**9
    first_s = max(0.0, -min(report["ready_s"]))  # of the first request
    sim.start([first_s + ready_s for ready_s in report["ready_s"]])
    sim.scheduler = observed = Observed(sim.scheduler, len(requests))
    for at_s, request in requests:
        sim.submit(first_s + at_s, request)
    sim.run()
    return observed.report


def figures(report: dict[str, Any]) -> dict[str, float]:
    moves = report["migrations"]
    return {
        "active_workers_mean": report["active_workers_mean"],
        "migrations": sum(moves[mode] for mode in ("transfer", "recompute", "split")),
        "migrated_bytes": report["migrated_bytes"],
        "wall_s": report["wall_s"],
        "preemptions": report["preemptions"],
        "wakes": report["wakes"],
        "tpot_ms": report["tpot_ms"]["p50"],
        "ttft_ms": report["ttft_ms"]["p50"],
    }


def requests_of(workload: Workload, report: dict[str, Any]) -> Iterator[tuple[float, Request]]:
    """(seconds from the start, request), as the real run has them."""
    config, (kv, num_blocks) = Config.from_dict(report["config"]), arena(report)
    room = num_blocks * kv.block_size
    longest = min(room, config.model.max_model_len or room)
    model = ServedModel(name=config.model.name, max_model_len=longest, vocab_size=2, eos_ids=())
    job = ReplayJob(workload, (model,), seed=0)
    return zip(job.arrivals(), job.requests(), strict=False)


def real(args: argparse.Namespace, trace: Path, directory: Path, policy: str) -> dict[str, Any]:
    """One run under mpirun; its report."""
    out = directory / "report.json"
    command = [
        "bash",
        str(ROOT / "launch" / "mpirun.sh"),
        "-n",
        str(args.workers + 1),
        sys.executable,
        str(ROOT / "bench" / "paced.py"),
        *map(str, args.pace),
        "run-batch",
        "--replay",
        str(trace),
        "--report",
        str(out),
        "--model",
        args.model,
        "--dtype",
        "float32",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--kv-cache-memory-bytes",
        args.kv,
        "--policy",
        policy,
        "--max-model-len",
        str(args.max_model_len),
        "--thrift",
        str(args.thrift),
    ]
    environment = {**os.environ, "MELLMPI_TIME_LIMIT": str(args.time_limit)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(out.read_text())


def write(workload: Workload, path: Path) -> None:
    rows = zip(workload.arrival_s, workload.prompt_tokens, workload.output_tokens, strict=True)
    lines = [f"{at:.6f},{prompt},{output}\n" for at, prompt, output in rows]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(lines))


def shorter(workload: Workload, longest: int) -> Workload:
    """Nothing that the model refuses: it would end with an error."""
    prompt = np.minimum(workload.prompt_tokens, longest - 1)
    output = np.minimum(workload.output_tokens, longest - prompt)
    return replace(workload, prompt_tokens=prompt, output_tokens=output)


def compare(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """Medians of both sides, and the relative difference of each figure."""
    found = {}
    for name in pairs[0][0]:
        ours, theirs = (statistics.median(pair[i][name] for pair in pairs) for i in (0, 1))
        difference = (theirs - ours) / ours if ours else (0.0 if theirs == ours else math.inf)
        found[name] = {"real": ours, "simulated": theirs, "difference": difference}
        if name in BARS:
            found[name] |= {"bar": BARS[name], "holds": abs(difference) <= BARS[name]}
    return found


def show(results: dict[str, Any]) -> None:
    table = Table("policy", "figure", "real", "simulated", "difference", "bar")
    for policy, result in results.items():
        for name, row in result["medians"].items():
            bar = (
                f"{100 * row['bar']:.0f} % {'ok' if row['holds'] else 'NO'}" if "bar" in row else ""
            )
            table.add_row(
                policy,
                name,
                f"{row['real']:.4g}",
                f"{row['simulated']:.4g}",
                f"{100 * row['difference']:+.1f} %",
                bar,
            )
    Console(stderr=True, width=100).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, metavar="FILE", help="default: a generated one")
    parser.add_argument("--requests", type=int, default=800, help="of the generated trace")
    parser.add_argument("--rate", type=float, default=6.0, help="requests/s of the generated one")
    parser.add_argument("--cv", type=float, default=1.0, help="1: Poisson; more: in bursts")
    parser.add_argument("--prompt", type=float, default=40.0, help="its mean prompt, tokens")
    parser.add_argument("--output", type=float, default=120.0, help="its mean answer, tokens")
    parser.add_argument(
        "--pace",
        type=float,
        nargs=3,
        default=[0.015, 1e-4, 2e-4],
        metavar=("STEP", "PREFILL", "DECODE"),
        help="seconds of a step, at least: see paced.py",
    )
    parser.add_argument("--policies", nargs="+", default=["frugal"])
    parser.add_argument(
        "--thrift",
        type=float,
        default=1.0,
        help="of frugal: the more, the more it moves, and the more their number says",
    )
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model", help="default: 2 layers of 64, random")
    parser.add_argument("--max-model-len", type=int, default=900)
    parser.add_argument("--kv", default="1M", help="KV cache of a worker")
    parser.add_argument("--time-limit", type=int, default=300, help="seconds a run may take")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write the real reports there")
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    workload = (
        load(args.trace)
        if args.trace
        else gamma(args.requests, args.rate, args.cv, args.prompt, args.output, seed=0)
    )
    workload = shorter(workload, args.max_model_len)
    results: dict[str, Any] = {}
    reports = []
    with tempfile.TemporaryDirectory() as name:
        trace = Path(name) / "trace.csv"
        write(workload, trace)
        if args.model is None:
            (Path(name) / "config.json").write_text(json.dumps(SHAPE))
            args.model = f"random:{name}"
        pairs: dict[str, list[Any]] = {policy: [] for policy in args.policies}
        for i in range(args.runs):
            for policy in args.policies:  # in turn: the load of the host changes
                report = real(args, trace, Path(name), policy)
                reports.append(report)
                model = simulated(report, list(requests_of(load(trace), report)), seed=i)
                pairs[policy].append((figures(report), figures(model)))
    for policy, found in pairs.items():
        results[policy] = {"medians": compare(found), "runs": found}
    if args.keep:
        args.keep.write_text(json.dumps(reports))
    show(results)
    config = {k: str(v) for k, v in vars(args).items() if k not in ("json", "keep")}
    finish(config, results, args.json)


if __name__ == "__main__":
    main()
