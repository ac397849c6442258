"""How do our runs of MELL's evaluation compare with the paper's? (INFOCOM 2025, section VIII)

Simulates the paper's two set-ups and four workloads in its idealised model, and prints our figures
beside the paper's: time average of the GPUs in use, GPUs saved against the baselines, migrations a
second, utilisation. The paper's GPU counts are read off a plot (± 0.2), the rest is given as text.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import add_json_option, finish
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mellmpi.workload import load

POLICIES = {"best_fit": "BF", "worst_fit": "WF", "load_balance": "LB", "mell": "MELL"}
OURS = "frugal"
WORKLOADS = {  # trace file, factor on its arrival rate
    "Infrequent": ("mell_x10_infrequent_dev.csv.gz", 1),
    "Middle": ("mell_x10_middle_dev.csv.gz", 1),
    "Frequent": ("mell_x10_frequent_dev.csv.gz", 1),
    "Azure 2023": ("azure23_conv_dev.csv.gz", 16),
}
# The paper does not give the memory for KV. With 8 GiB on a 4090 our live KV equals its GPUs times
# its utilisation; 16 GiB remain of 40 GB beside the weights of the 13B model.
SETUPS = {"LLaMA-2-13B, A100-40G": ("llama-2-13b", 16), "LLaMA-2-7B, RTX 4090": ("llama-2-7b", 8)}
PAPER: dict[str, dict[str, dict[str, list[float]]]] = {  # in the order of WORKLOADS
    "LLaMA-2-13B, A100-40G": {
        "gpus": {
            "best_fit": [33.6, 53.2, 75.0, 54.4],
            "worst_fit": [34.1, 53.0, 73.2, 53.8],
            "load_balance": [32.5, 48.7, 66.8, 50.0],
            "mell": [29.4, 43.0, 56.8, 44.5],
        },
        "migrations_per_s": {
            "load_balance": [5.9, 12.2, 18.7, 12.8],
            "mell": [4.4, 9.0, 15.4, 9.1],
        },
        "utilization": {
            "best_fit": [78, 76, 75, 77],
            "worst_fit": [76, 76, 76, 77],
            "load_balance": [79, 81, 82, 81],
            "mell": [87, 91, 95, 90],
        },
    },
    "LLaMA-2-7B, RTX 4090": {
        "gpus": {
            "best_fit": [32.4, 41.1, 51.4, 39.9],
            "worst_fit": [29.6, 37.0, 45.5, 36.0],
            "load_balance": [27.7, 34.1, 41.3, 33.0],
            "mell": [24.7, 29.8, 35.4, 28.9],
        },
        "migrations_per_s": {
            "load_balance": [9.2, 13.0, 19.0, 12.7],
            "mell": [6.2, 8.7, 11.8, 8.1],
        },
        "utilization": {
            "best_fit": [68, 67, 65, 67],
            "worst_fit": [74, 74, 73, 74],
            "load_balance": [79, 79, 80, 80],
            "mell": [88, 91, 93, 89],
        },
    },
}
SHOWN = {
    "gpus": "GPUs (time average)",
    "saved": "GPUs saved against it by {} (%)",
    "migrations_per_s": "migrations a second",
    "utilization": "utilisation (%)",
}


def simulated(trace: Path, rate_scale: float, model: str, gib: float) -> dict[str, Any]:
    """The report of `python -m mellmpi simulate` on one workload."""
    policies = ",".join([*POLICIES, OURS])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [
            sys.executable,
            "-m",
            "mellmpi",
            "simulate",
            "--trace",
            str(trace),
            "--ideal",
            "--rate-scale",
            str(rate_scale),
            "--model",
            model,
            "--gpu-kv-gib",
            str(gib),
            "--policies",
            policies,
            "--json",
            str(out),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def figures(report: dict[str, Any], seconds: float) -> dict[str, dict[str, float]]:
    """The figures of each policy; `seconds`: from the first arrival to the last."""
    found = {}
    for name, policy in report["policies"].items():
        found[name] = {
            "gpus": policy["gpus_mean"],
            "gpus_peak": policy["gpus_peak"],
            "gpus_over_bound": policy["gpus_over_bound"],
            "migrations_per_s": policy["migrations"] / seconds,
            "migrations_per_request": policy["migrations_per_request"],
            "migrated_bytes_per_kv_byte": policy["migrated_bytes_per_kv_byte"],
            "utilization": 100 * policy["utilization"],
            "preemptions": policy["preemptions"],
            "stall_mean_s": policy["stall_mean_s"],
        }
    return found


def saved(policies: dict[str, dict[str, float]], other: str, by: str) -> float:
    """GPUs that `by` saves against `other`, in percent."""
    return 100 * (1 - policies[by]["gpus"] / policies[other]["gpus"])


def paper_value(setup: str, column: int, figure: str, policy: str) -> float | None:
    """A figure of the paper; None if the paper does not give it."""
    if figure == "saved":
        gpus = PAPER[setup]["gpus"]
        return 100 * (1 - gpus["mell"][column] / gpus[policy][column])
    values = PAPER[setup][figure].get(policy)
    return values[column] if values else None


def table(setup: str, ours: dict[str, Any]) -> Table:
    """Our figures, with the paper's in brackets; one column for each workload."""
    shown = Table(title=f"{setup}: ours (paper)", title_justify="left")
    for heading in ("", "policy", *ours):
        shown.add_column(heading, justify="left" if heading in ("", "policy") else "right")
    for figure, title in SHOWN.items():
        for policy in [*POLICIES, OURS]:
            if figure == "saved" and policy in ("mell", OURS):
                continue
            cells = (cell(setup, i, figure, policy, r) for i, r in enumerate(ours.values()))
            shown.add_row(title.format("mell"), policy, *cells)
            title = ""
        shown.add_section()
    return shown


def cell(setup: str, column: int, figure: str, policy: str, report: dict[str, Any]) -> str:
    policies = report["policies"]
    value = saved(policies, policy, "mell") if figure == "saved" else policies[policy][figure]
    theirs = paper_value(setup, column, figure, policy)
    return f"{value:.1f}" + (f" ({theirs:.1f})" if theirs is not None else "")


def draw(path: Path, results: dict[str, Any]) -> None:
    """Bars: ours; diamonds: the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [figure for figure in SHOWN if figure != "saved"]
    canvas, grid = plt.subplots(len(rows), len(results), figsize=(13, 9), sharex=True)
    for j, (setup, ours) in enumerate(results.items()):
        for axes, figure in zip(grid[:, j], rows, strict=True):
            bars(axes, setup, figure, ours)
            axes.set_ylabel(SHOWN[figure])
            axes.grid(axis="y", alpha=0.3)
        grid[0, j].set_title(setup)
    grid[0, 0].legend(fontsize=8, ncols=2)
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)


def bars(axes: Any, setup: str, figure: str, ours: dict[str, Any]) -> None:
    names = [*POLICIES, OURS]
    width = 0.8 / len(names)
    for k, policy in enumerate(names):
        at = [i + (k - (len(names) - 1) / 2) * width for i in range(len(ours))]
        heights = [report["policies"][policy][figure] for report in ours.values()]
        axes.bar(at, heights, width * 0.92, color=f"C{k}", label=policy)
        marks = [(x, paper_value(setup, i, figure, policy)) for i, x in enumerate(at)]
        known = [(x, y) for x, y in marks if y is not None]
        if known:
            label = "the paper's" if policy == "mell" else None
            axes.plot(*zip(*known, strict=True), "kD", ms=4, mfc="white", label=label)
    axes.set_xticks(range(len(ours)), list(ours))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--traces",
        type=Path,
        default=os.environ.get("MELLMPI_TRACES"),
        help="folder of the traces (default: $MELLMPI_TRACES)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the plot to this file")
    add_json_option(parser)
    args = parser.parse_args()
    if args.traces is None:
        parser.error("the folder of the traces is missing: --traces FOLDER, or MELLMPI_TRACES")
    console = Console(stderr=True, width=110)
    results: dict[str, dict[str, Any]] = {setup: {} for setup in SETUPS}
    cases = [(setup, name) for setup in SETUPS for name in WORKLOADS]
    for setup, name in track(cases, "simulating", console=console):
        file, rate_scale = WORKLOADS[name]
        report = simulated(args.traces / file, rate_scale, *SETUPS[setup])
        arrivals_s = load(args.traces / file).faster(rate_scale).arrival_s
        seconds = float(arrivals_s[-1] - arrivals_s[0])
        results[setup][name] = {
            "lower_bound": report["lower_bound"],
            "requests": report["requests"],
            "dropped": report["dropped"],
            "seconds": seconds,
            "policies": figures(report, seconds),
        }
    for setup, ours in results.items():
        console.print(table(setup, ours))
    if args.plot:
        draw(args.plot, results)
    config = {"workloads": WORKLOADS, "setups": SETUPS}
    finish(config, {"ours": results, "paper": PAPER}, args.json)


if __name__ == "__main__":
    main()
