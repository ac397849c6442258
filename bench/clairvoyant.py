"""How many moves and GPUs would `frugal` save if it knew the future?

On parts of four traces, in the idealised model: the policy itself, its rule compiled
(`clairvoyant_rule`; the two should agree), and the search, which tries the rule's best choices at
every arrival, relief and drain against the true future.
"""

import argparse
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from clairvoyant_rule import MAX_REQUESTS, Cluster, Requests, Rule
from clairvoyant_search import Replay, Search, run
from record import add_json_option, finish
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mellmpi.costs import MEMORY
from mellmpi.protocol import ModelKv
from mellmpi.scheduler.policies.frugal import draining, forecast
from mellmpi.sim import MODELS, NO_COST, IdealReplay, Load, Settings, make_load
from mellmpi.workload import Workload, gamma, load

RATE, TICK_S, THRIFT = 30.0, 0.25, 0.5  # as `simulate --ideal` has them
LEAD_IN_S = 20.0  # the search starts this long before the part that is evaluated


@dataclass(frozen=True)
class Case:
    """A part of a trace, and the parameters of its search."""

    trace: str  # "": a generated load
    rate_scale: float
    model: str
    gpu_kv_gib: float
    from_s: float
    until_s: float
    choices: int
    horizon_s: float
    gpu_moves: float  # cost of a GPU for a second, in moves


CASES = {
    "frequent": Case("mell_x10_frequent_dev.csv.gz", 1, "llama-2-7b", 8, 600, 1400, 8, 20, 3),
    "frequent-dear": Case(
        "mell_x10_frequent_dev.csv.gz", 1, "llama-2-7b", 8, 600, 1400, 12, 30, 1.5
    ),
    "conv": Case("azure23_conv_dev.csv.gz", 16, "llama-2-13b", 16, 30, 100, 6, 6, 15),
    "sharegpt": Case("sharegpt_gamma_cv3_dev.csv.gz", 4, "llama-2-13b", 16, 100, 250, 8, 10, 10),
    "servegen": Case("servegen_r1_dev.csv.gz", 4, "llama-2-13b", 16, 200, 400, 6, 15, 15),
}
GENERATED = Case("", 1, "llama-2-13b", 16, 60, 120, 8, 10, 10)


def workload_of(case: Case, traces: Path | None) -> Workload:
    if case.trace == "":
        return gamma(2000, 15.0, 1.5, 500, 300, seed=1)
    assert traces is not None
    return load(traces / case.trace).faster(case.rate_scale)


def load_of(case: Case, workload: Workload) -> Load:
    token_bytes = MODELS[case.model].token_bytes
    return make_load(workload, {"": token_bytes}, int(case.gpu_kv_gib * 2**30), RATE)


def mean_answer(load: Load, step: int) -> float:
    """Mean tokens of the answers that ended last before a step, as the policy knows it."""
    ends = load.arrivals + load.outputs
    ended = np.flatnonzero(ends <= step)
    lately = ended[np.argsort(ends[ended], kind="stable")][-MEMORY:]
    return float((load.outputs[lately] if len(lately) else load.outputs).mean())


def rule_of(load: Load, mean: float) -> Rule:
    """The policy's constants for tokens of one byte and answers of `mean` tokens."""
    round_steps = round(TICK_S * load.rate)
    capacity = float(load.capacity // load.token_bytes[""])
    view: Any = SimpleNamespace(
        thrift=THRIFT,
        period_s=round_steps / load.rate,
        cost=NO_COST,
        token_rate=load.rate,
        answer_tokens=mean,
        lengths=SimpleNamespace(mean_output=lambda default: default),
        workers=SimpleNamespace(capacity=np.array([0.0, capacity])),
    )
    return Rule(
        capacity,
        load.rate,
        round_steps,
        forecast.request_end_rate(view),
        forecast.move_price(view, 1),
        forecast.min_overflow_s(view),
        forecast.LEAD_ROUNDS * view.period_s,
        forecast.time_scale(view) * draining.CLUSTER_OVERFLOW_S,
        forecast.time_scale(view) * draining.EXTRA_WORKERS,
        draining.MAX_FAILURES,
        forecast.cost_params(view),
    )


def part(case: Case, load: Load) -> tuple[int, int, int]:
    """(first step, last step, arrivals) of the part that is evaluated."""
    first = int(load.arrivals[0] + case.from_s * load.rate)
    last = int(load.arrivals[0] + case.until_s * load.rate)
    arrivals = int(((load.arrivals >= first) & (load.arrivals <= last)).sum())
    return first, last, arrivals


def over_bound(case: Case, load: Load, gpus: np.ndarray) -> float:
    """GPUs at the samples of the part, over the bound there."""
    first, last, _ = part(case, load)
    inside = (load.samples >= first) & (load.samples <= last)
    return float(gpus[inside[: len(gpus)]].sum() / load.bound[inside].sum())


def empty_cluster(num_workers: int, capacity: float) -> Cluster:
    rows = num_workers + 1
    return Cluster(
        np.full(rows, capacity),
        np.zeros(rows),
        np.zeros(rows),
        np.zeros(rows, np.int64),
        np.zeros((rows, MAX_REQUESTS), np.int64),
        np.ones(rows, np.bool_),
        np.zeros(rows, np.bool_),
    )


def by_search(case: Case, load: Load, choices: int) -> dict[str, Any]:
    """Run the compiled rule, or the search if `choices` is more than 1."""
    first, last, arrivals = part(case, load)
    search = Search(
        int(first - LEAD_IN_S * load.rate), choices, int(case.horizon_s * load.rate), case.gpu_moves
    )
    requests = Requests(load.arrivals, load.prompts, load.arrivals + load.outputs)
    rule = rule_of(load, mean_answer(load, first))
    num_workers = int(1.25 * load.bound.max()) + 8
    clusters = [empty_cluster(num_workers, rule.capacity) for _ in range(2)]
    samples = load.samples[load.samples <= last]
    began_s = time.perf_counter()
    gpus, done = run(Replay(requests, rule, search, *clusters), samples)
    moves, tokens, overflows = done[first - load.arrivals[0] :].sum(axis=0).tolist()
    return {
        "gpus_over_bound": over_bound(case, load, gpus),
        "moves_per_request": moves / arrivals,
        "moved_tokens_per_request": tokens / arrivals,
        "overflows": int(overflows),
        "seconds": time.perf_counter() - began_s,
    }


def by_package(case: Case, load: Load) -> dict[str, Any]:
    """Run the policy on the same part, as `simulate --ideal --policies frugal`."""
    first, last, arrivals = part(case, load)
    begun = load.arrivals <= last
    shorter = replace(
        load, arrivals=load.arrivals[begun], samples=load.samples[load.samples <= last]
    )
    hosts = [(ModelKv("", 1, load.token_bytes[""]),)] * (2 * int(load.bound.max()) + 16)
    settings = Settings(THRIFT, TICK_S, 0, time.perf_counter)
    began_s = time.perf_counter()
    tally = IdealReplay(shorter, "frugal", hosts, settings).run(lambda arrived: None)
    moved = [size for at, size in tally.moves if first <= at * load.rate <= last]
    return {
        "gpus_over_bound": over_bound(case, load, np.array(tally.gpus)),
        "moves_per_request": len(moved) / arrivals,
        "moved_tokens_per_request": sum(moved) / load.token_bytes[""] / arrivals,
        "seconds": time.perf_counter() - began_s,
    }


def table(results: dict[str, Any]) -> Table:
    """Mean GPUs over bound @ moves a request."""
    shown = Table(title="mean GPUs over bound @ moves a request", title_justify="left")
    for heading in ("part of", "package", "the rule, compiled", "tried", "reached"):
        shown.add_column(heading, no_wrap=True)
    for name, found in results.items():
        case = found["case"]
        shown.add_row(
            f"{name}, {case['from_s']:g} to {case['until_s']:g} s",
            cell(found["package"]),
            cell(found["rule"]),
            f"{case['choices']} choices, {case['horizon_s']:g} s, g = {case['gpu_moves']:g}",
            cell(found["search"]),
        )
    return shown


def cell(found: dict[str, float]) -> str:
    return f"{found['gpus_over_bound']:.3f} @ {found['moves_per_request']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--traces",
        type=Path,
        default=os.environ.get("MELLMPI_TRACES"),
        help="folder of the traces (default: $MELLMPI_TRACES); "
        "without one, a generated load is used",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=CASES, default=list(CASES), help="parts to run"
    )
    parser.add_argument("--choices", type=int, help="choices tried at each decision")
    parser.add_argument("--horizon-s", type=float, help="seconds of future played for each choice")
    parser.add_argument("--gpu-moves", type=float, help="cost of a GPU for a second, in moves")
    add_json_option(parser)
    args = parser.parse_args()
    given = {"choices": args.choices, "horizon_s": args.horizon_s, "gpu_moves": args.gpu_moves}
    cases = {name: CASES[name] for name in args.parts} if args.traces else {"generated": GENERATED}
    console = Console(stderr=True, width=110)
    results = {}
    for name, base in track(cases.items(), "searching", console=console):
        case = replace(base, **{key: value for key, value in given.items() if value is not None})
        trace = load_of(case, workload_of(case, args.traces))
        results[name] = {
            "case": asdict(case),
            "package": by_package(case, trace),
            "rule": by_search(case, trace, 1),
            "search": by_search(case, trace, case.choices),
        }
    console.print(table(results))
    config = {"decode_rate": RATE, "tick_s": TICK_S, "thrift": THRIFT, "lead_in_s": LEAD_IN_S}
    finish(config, results, args.json)


if __name__ == "__main__":
    main()
