"""Is a request sent, computed again, or both, and was that the fastest way?

    python bench/crossover.py [--links shm 10gbit 1gbit] [--contexts 128 … 8192]
                              [--json FILE] [--figure docs/crossover.png]
    python bench/crossover.py --draw FILE --figure docs/crossover.png

For every link and context: the time of each forced way, from the decision to the destination's
word (a recompute: its first token), and what was chosen. The links of two hosts need root: they
are network namespaces and a token bucket (bench/two_hosts.sh). The figure needs matplotlib.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from moving import LINKS, run
from record import add_json_option, finish

CONTEXTS = [128, 256, 512, 1024, 2048, 4096, 8192]
WAYS = ("transfer", "recompute", "split")
NEAR, WORST, SPLIT, ERROR = 1.10, 1.30, 0.75, 0.25  # the bars


def cell(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One link and context: medians of the forced ways, and the choice against them."""

    def median_s(asked: str, mode: str | None = None) -> float | None:
        took = [r["took_s"] for r in rows if r["asked"] == asked and r["outcome"] == "moved"
                and mode in (None, r["mode"])]  # fmt: skip
        return statistics.median(took) if took else None

    forced = {way: median_s(way, way) for way in WAYS}
    known = {way: s for way, s in forced.items() if s is not None}
    chosen = [r["mode"] for r in rows if r["asked"] == "chosen"]
    mode = statistics.mode(chosen)
    errors = [abs(r["predicted_s"] - r["took_s"]) / r["took_s"] for r in rows
              if r["asked"] == "chosen" and r["outcome"] == "moved"]  # fmt: skip
    better = min(s for way, s in known.items() if way != "split")
    worse = max(s for way, s in known.items() if way != "split")
    return {
        "forced_s": forced, "chosen": mode, "chosen_all": chosen,
        "chosen_s": median_s("chosen"), "chosen_over_best": known[mode] / min(known.values()),
        "prediction_error": statistics.median(errors),
        "split_over_better": known["split"] / better if "split" in known else None,
        "near_each_other": worse <= 1.5 * better,
    }  # fmt: skip


def verdict(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole grid against the bars."""
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
    """A panel a link: seconds over context, each way a line, the choices as marks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grid = results["grid"]
    figure, panels = plt.subplots(1, len(grid), figsize=(5 * len(grid), 4.2), squeeze=False)
    colors = dict(zip(WAYS, ("C0", "C3", "C2"), strict=True))
    for axes, (link, cells) in zip(panels[0], grid.items(), strict=True):
        for way in WAYS:
            points = [(int(n), c["forced_s"][way]) for n, c in cells.items()]
            points = [(n, s) for n, s in points if s is not None]
            axes.plot(*zip(*points, strict=True), "-", color=colors[way], label=way)
        for n, c in cells.items():
            axes.plot(int(n), c["forced_s"][c["chosen"]], "o", color=colors[c["chosen"]], ms=8,
                      mfc="none", label="chosen" if n == next(iter(cells)) else None)  # fmt: skip
        axes.set(xscale="log", yscale="log", title=link, xlabel="context, tokens")
        axes.set_xticks([int(n) for n in cells], list(cells), minor=False)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("seconds to move one request")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--links", nargs="+", choices=LINKS, default=["shm", "10gbit", "1gbit"])
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--repeats", type=int, default=5, help="of each way and context")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="measure nothing: draw this")
    add_json_option(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.draw is not None:
        return draw(json.loads(args.draw.read_text())["results"], args.figure)
    grid: dict[str, Any] = {}
    for link in args.links:
        rows = run(link, args.contexts, [*WAYS, None], args.repeats)
        grid[link] = {
            str(n): cell([row for row in rows if row["context"] == n]) for n in args.contexts
        }
    results = {
        "verdict": verdict([c for cells in grid.values() for c in cells.values()]), "grid": grid
    }  # fmt: skip
    config = {k: v for k, v in vars(args).items() if k not in ("json", "figure", "draw")}
    finish(config, results, args.json)
    if args.figure is not None:
        draw(results, args.figure)


if __name__ == "__main__":
    main()
