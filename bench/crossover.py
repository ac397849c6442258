"""Is the KV of a request transferred, recomputed, or split, and is that the fastest mode?

    python bench/crossover.py [--links shm 10gbit 1gbit] [--contexts 128 … 8192]
                              [--json FILE] [--figure docs/crossover.png]
    python bench/crossover.py --draw FILE --figure docs/crossover.png

About 15 minutes for the whole grid. For every link and context: the time of each forced mode, from
the decision to the destination's confirmation (recompute: to its first token), and the chosen mode.
The links of two hosts need root: they are network namespaces and a token bucket
(bench/two_hosts.sh). The figure needs matplotlib.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from moving import LINKS, run
from record import add_json_option, finish

CONTEXTS = [128, 256, 512, 1024, 2048, 4096, 8192]
MODES = ("transfer", "recompute", "split")
STYLES = {"transfer": ("C0", "s"), "recompute": ("C3", "^"), "split": ("C2", "D")}
NAMES = {"shm": "shared memory", "10gbit": "10 Gbit/s", "1gbit": "1 Gbit/s"}
CLOSE = 1.3  # ratio of times below which modes are measured more often
NEAR, WORST, SPLIT, ERROR = 1.10, 1.30, 0.75, 0.25  # the targets of `verdict`


def median_s(rows: list[dict[str, Any]], asked: str, mode: str | None = None) -> float | None:
    """Median time of the moves with this request and this mode (None: any); None: no such move."""
    took = [
        r["took_s"]
        for r in rows
        if r["asked"] == asked and r["outcome"] == "moved" and mode in (None, r["mode"])
    ]
    return statistics.median(took) if took else None


def forced_s(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Median time of each forced mode; None: too short a request for a split."""
    return {mode: median_s(rows, mode, mode) for mode in MODES}


def close(rows: list[dict[str, Any]]) -> bool:
    """Two modes take so similar times that a few moves do not tell which is faster."""
    seconds = sorted(s for s in forced_s(rows).values() if s is not None)
    return seconds[1] <= CLOSE * seconds[0]


def cell(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One link and context: medians of the forced modes, and the chosen mode compared to them."""
    forced = forced_s(rows)
    known = {mode: s for mode, s in forced.items() if s is not None}
    chosen = [r["mode"] for r in rows if r["asked"] == "chosen"]
    mode = statistics.mode(chosen)
    errors = [
        abs(r["predicted_s"] - r["took_s"]) / r["took_s"]
        for r in rows
        if r["asked"] == "chosen" and r["outcome"] == "moved"
    ]
    better = min(s for mode, s in known.items() if mode != "split")
    worse = max(s for mode, s in known.items() if mode != "split")
    return {
        "forced_s": forced,
        "chosen": mode,
        "chosen_all": chosen,
        "chosen_s": median_s(rows, "chosen"),
        "chosen_over_best": statistics.median(known[m] for m in chosen) / min(known.values()),
        "prediction_error": statistics.median(errors),
        "split_over_better": known["split"] / better if "split" in known else None,
        "near_each_other": worse <= 1.5 * better,
        "moves": len(rows),
    }


def verdict(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the whole grid with the targets."""
    over = [c["chosen_over_best"] for c in cells]
    near = [c["split_over_better"] for c in cells if c["near_each_other"]]
    near = [ratio for ratio in near if ratio is not None]
    error = statistics.median(c["prediction_error"] for c in cells)
    share = sum(ratio <= NEAR for ratio in over) / len(over)
    return {
        "cells": len(cells),
        "chosen_within_10_percent": {"share": share, "holds": share >= 0.9},
        "chosen_worst": {"over_best": max(over), "holds": max(over) <= WORST},
        "prediction_error": {"median": error, "holds": error <= ERROR},
        "split_over_better": {"near": near, "holds": all(ratio <= SPLIT for ratio in near)},
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """One plot per link: milliseconds over context, one line per mode, the chosen mode circled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grid = results["grid"]
    figure, panels = plt.subplots(
        1, len(grid), figsize=(1 + 4.2 * len(grid), 4.4), squeeze=False, sharey=True
    )
    for axes, (link, cells) in zip(panels[0], grid.items(), strict=True):
        contexts = [int(n) for n in cells]
        for mode, (color, mark) in STYLES.items():
            points = [(int(n), c["forced_s"][mode]) for n, c in cells.items()]
            known = [(n, 1e3 * s) for n, s in points if s is not None]
            if known:
                axes.plot(*zip(*known, strict=True), mark, ls="-", color=color, ms=5, label=mode)
        chosen = [1e3 * c["forced_s"][c["chosen"]] for c in cells.values()]
        axes.plot(contexts, chosen, "o", color="black", ms=13, mfc="none", mew=1.2, label="chosen")
        axes.set(xscale="log", yscale="log", title=NAMES[link], xlabel="context, tokens")
        axes.set_xticks(contexts, list(cells), minor=False)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("milliseconds to move one request")
    panels[0][0].yaxis.set_major_formatter("{x:g}")
    panels[0][0].legend(loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--links", nargs="+", choices=LINKS, default=["shm", "10gbit", "1gbit"])
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--repeats", type=int, default=4, help="of each mode and context")
    parser.add_argument("--more", type=int, default=8, help="where two modes are close")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    parser.add_argument(
        "--draw", type=Path, metavar="FILE", help="do not measure: draw this result"
    )
    add_json_option(parser)
    return parser.parse_args()


def measured(link: str, contexts: list[int], repeats: int, more: int) -> dict[int, Any]:
    """Records of moves, by context; more of them where modes are close to each other."""
    moves: dict[int, Any] = {n: [] for n in contexts}
    move_all(link, contexts, repeats, moves)
    move_all(link, [n for n in contexts if close(moves[n])], more, moves)
    return moves


def move_all(link: str, contexts: list[int], repeats: int, moves: dict[int, Any]) -> None:
    """Run one job and add its records to `moves`."""
    if not contexts or not repeats:
        return
    tell(f"{NAMES[link]}: contexts {contexts}, each mode {repeats} times")
    for row in run(link, contexts, [*MODES, None], repeats):
        moves[row["context"]].append(row)
    for n in contexts:
        times = [f"{mode} {1e3 * s:.1f}" for mode, s in forced_s(moves[n]).items() if s is not None]
        tell(f"{n:6} tokens: {', '.join(times)} ms; chosen: {cell(moves[n])['chosen']}")


def tell(line: str) -> None:
    """Print progress to standard error; standard output is for the result."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    args = arguments()
    if args.draw is not None:
        return draw(json.loads(args.draw.read_text())["results"], args.figure)
    grid: dict[str, Any] = {}
    for link in args.links:
        moves = measured(link, args.contexts, args.repeats, args.more)
        grid[link] = {str(n): cell(rows) for n, rows in moves.items()}
    results = {
        "verdict": verdict([c for cells in grid.values() for c in cells.values()]),
        "grid": grid,
    }
    config = {k: v for k, v in vars(args).items() if k not in ("json", "figure", "draw")}
    finish(config, results, args.json)
    if args.figure is not None:
        draw(results, args.figure)


if __name__ == "__main__":
    main()
