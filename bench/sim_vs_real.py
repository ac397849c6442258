"""Do a simulated run and a real one agree? Both replay one trace; the cost model is measured.

The real runs are `run-batch --replay` on this host, with steps that take as long as on a GPU
(paced.py). Each run is simulated (simulated_run.py) with costs fitted to its own report. Compared
are mean active workers (within 5 %) and migrations (within 20 %), medians over the runs.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import ROOT, add_json_option, finish
from rich.console import Console
from rich.table import Table
from simulated_run import requests_of, simulated

from mellmpi.workload import Workload, gamma, load

BARS = {"active_workers_mean": 0.05, "migrations": 0.20}
SHAPE = {  # tiny; 1 KiB of KV per token in float32
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


def real(args: argparse.Namespace, trace: Path, directory: Path, policy: str) -> dict[str, Any]:
    """Run the trace under mpirun. Returns its report."""
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
    """Cut prompts and outputs to the longest sequence that the model accepts."""
    prompt = np.minimum(workload.prompt_tokens, longest - 1)
    output = np.minimum(workload.output_tokens, longest - prompt)
    return replace(workload, prompt_tokens=prompt, output_tokens=output)


def compare(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """Return medians of real and simulated runs, and the relative difference, of each figure."""
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
    parser.add_argument("--trace", type=Path, metavar="FILE", help="default: a generated trace")
    parser.add_argument("--requests", type=int, default=800, help="of the generated trace")
    parser.add_argument("--rate", type=float, default=6.0, help="requests/s of the generated trace")
    parser.add_argument("--cv", type=float, default=1.0, help="1: Poisson; more: in bursts")
    parser.add_argument("--prompt", type=float, default=40.0, help="its mean prompt, tokens")
    parser.add_argument("--output", type=float, default=120.0, help="its mean answer, tokens")
    parser.add_argument(
        "--pace",
        type=float,
        nargs=3,
        default=[0.015, 1e-4, 2e-4],
        metavar=("STEP", "PREFILL", "DECODE"),
        help="shortest duration of a step, seconds: see paced.py",
    )
    parser.add_argument("--policies", nargs="+", default=["frugal"])
    parser.add_argument(
        "--thrift",
        type=float,
        default=1.0,
        help="of frugal: more moves make their number more significant",
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
            for policy in args.policies:  # alternating, since the load of the host changes
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
