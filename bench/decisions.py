"""What does one decision of a policy cost, from 10 workers to 1,000 with 100,000 live requests?

    python bench/decisions.py [--json FILE] [--plot FILE.png]

The view is built directly: every worker holds 100 requests of all sizes and ages and overflows
within 10 s, one in thirty before the next round. Measured in CPU time: a placement (`place`, mean)
and a rebalancing pass (`rebalance`, median).
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from record import add_json_option, finish

from mellmpi.costs import CostModel
from mellmpi.protocol import GREEDY, ModelKv, Request
from mellmpi.scheduler import Ledger, RequestColumns, View, WorkerState
from mellmpi.scheduler.policies import POLICIES, policy_for

WORKERS = (10, 30, 100, 300, 1000)
REQUESTS = 100  # on each worker
MEAN_TOKENS, ANSWER_TOKENS, TOKENS_PER_S = 800, 400, 30.0
FULL_WITHIN_S, PERIOD_S = 10.0, 0.25
PLACEMENTS, ROUNDS, REPEATS = 200, 5, 3
KV = ModelKv("m", block_size=16, block_bytes=16 * 2**17)


def make_view(num_workers: int, seed: int) -> View:
    """A nearly full cluster of active workers, and a tenth as many parked ones."""
    rng = np.random.default_rng(seed)
    num_parked = max(1, num_workers // 10)
    ledger, columns = Ledger(num_workers + num_parked), make_columns(num_workers, rng)
    growth = REQUESTS * TOKENS_PER_S * KV.block_bytes / KV.block_size
    left = rng.uniform(0, FULL_WITHIN_S, num_workers) * growth
    held, capacity = fill(columns, left)
    for worker in range(1, num_workers + num_parked + 1):
        ledger.ready(worker, (KV,), capacity, 4 * REQUESTS, acked=0)
        if worker > num_workers:
            ledger.drop_arena(worker, WorkerState.PARKED)
    ledger.free[1 : num_workers + 1] = np.maximum(0, capacity - held)
    ledger.num_requests[1 : num_workers + 1] = REQUESTS
    ledger.activated[1 : num_workers + 1] = np.arange(num_workers)
    rates = np.zeros(len(ledger.state))
    rates[1 : num_workers + 1] = growth
    return View(
        now=100.0,
        workers=ledger,
        requests=columns,
        waiting_bytes=0,
        growth_Bps=rates,
        token_rate=TOKENS_PER_S,
        answer_tokens=ANSWER_TOKENS,
        park_after_s=1.0,
        seed=seed,
        tick=1,
        period_s=PERIOD_S,
        cost=CostModel(wake_s=0.0),
    )


def fill(columns: RequestColumns, left: np.ndarray) -> tuple[np.ndarray, int]:
    """Scale requests until equal workers have `left` bytes free; (bytes held, capacity)."""
    rows = np.flatnonzero(columns.live & (columns.worker > 0))
    on = columns.worker[rows] - 1
    before = np.bincount(on, columns.kv_bytes(rows))
    capacity = int(before.mean() + left.mean())
    share = (capacity - left) / before
    columns.num_tokens[rows] = np.maximum(1, columns.num_tokens[rows] * share[on])
    columns.num_prompt[rows] = np.maximum(1, columns.num_tokens[rows] // 2)
    return np.bincount(on, columns.kv_bytes(rows)).astype(np.int64), capacity


def make_columns(num_workers: int, rng: np.random.Generator) -> RequestColumns:
    """`REQUESTS` on each worker; the first `PLACEMENTS` rows are requests that wait."""
    placed = num_workers * REQUESTS
    columns = RequestColumns(placed + PLACEMENTS)
    sampling = replace(GREEDY, max_tokens=4096)
    for i in range(placed + PLACEMENTS):
        columns.add(Request(i, KV.model, (0,), sampling, None, 0, None), KV)
    tokens = np.maximum(16, rng.exponential(MEAN_TOKENS, placed + PLACEMENTS)).astype(np.int64)
    columns.num_tokens[:] = tokens
    columns.num_prompt[:] = np.maximum(1, tokens // 2)
    order = rng.permutation(placed)  # rows are reused, so they are in no order
    columns.worker[PLACEMENTS + order] = np.repeat(np.arange(1, num_workers + 1), REQUESTS)
    columns.movable[PLACEMENTS:] = True
    return columns


def measure(name: str, num_workers: int, seed: int) -> dict[str, float]:
    """Microseconds of a placement, milliseconds of a pass, and the pass's number of proposals."""
    policy, view = policy_for(name, "auto"), make_view(num_workers, seed)
    rounds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        proposals = policy.rebalance(view)
        rounds.append(time.process_time() - began)
    began = time.process_time()
    for row in range(PLACEMENTS):
        policy.place(view, row, KV.model)
    place_s = (time.process_time() - began) / PLACEMENTS
    return {
        "us_per_placement": place_s * 1e6,
        "placements_per_s": 1 / place_s,
        "ms_per_pass": statistics.median(rounds) * 1e3,
        "proposals": len(proposals),
    }


def draw(path: Path, results: dict[str, dict[int, dict[str, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (rate, passes) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name, by_workers in results.items():
        sizes = list(by_workers)
        rate.loglog(sizes, [m["placements_per_s"] for m in by_workers.values()], "o-", label=name)
        passes.loglog(sizes, [m["ms_per_pass"] for m in by_workers.values()], "o-", label=name)
    rate.axhline(1 / 20e-6, color="0.5", ls=":", label="20 µs each")
    passes.axhline(50, color="0.5", ls=":", label="50 ms")
    rate.set(title="Placements", ylabel="per second of one core")
    passes.set(title="One rebalancing pass", ylabel="ms")
    for axes in (rate, passes):
        axes.set_xlabel(f"workers, with {REQUESTS} requests each")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json_option(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot durations against workers")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="cluster sizes")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help="default: all")
    args = parser.parse_args()
    runs: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in range(REPEATS):
        for num_workers in args.workers:
            for name in args.policies:
                found = measure(name, num_workers, seed)
                runs.setdefault((name, num_workers), []).append(found)
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in args.policies}
    for (name, num_workers), found in runs.items():
        results[name][num_workers] = {
            key: round(statistics.median(r[key] for r in found), 2) for key in found[0]
        }
    config: dict[str, Any] = {
        "requests_per_worker": REQUESTS,
        "mean_tokens": MEAN_TOKENS,
        "period_s": PERIOD_S,
        "full_within_s": FULL_WITHIN_S,
        "repeats": REPEATS,
        "clock": "CPU time",
    }
    if args.plot:
        draw(args.plot, results)
    finish(config, {"by_policy": results}, args.json)


if __name__ == "__main__":
    main()
