"""Is a request sent, computed again, or both, and was that the fastest way?

    python bench/crossover.py [--links shm 10gbit 1gbit] [--contexts 128 … 8192]
                              [--json FILE] [--figure docs/crossover.png]
    python bench/crossover.py --draw FILE --figure docs/crossover.png

Some 15 minutes for the whole grid. For every link and context: the time of each forced way, from
the decision to the destination's word (a recompute: its first token), and what was chosen. The
links of two hosts need root: they are network namespaces and a token bucket (bench/two_hosts.sh).
The figure needs matplotlib.
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
WAYS = ("transfer", "recompute", "split")
LOOKS = {"transfer": ("C0", "s"), "recompute": ("C3", "^"), "split": ("C2", "D")}
NAMES = {"shm": "shared memory", "10gbit": "10 Gbit/s", "1gbit": "1 Gbit/s"}
CLOSE = 1.3  # two ways nearer to each other are measured more often
NEAR, WORST, SPLIT, ERROR = 1.10, 1.30, 0.75, 0.25  # the bars


def median_s(rows: list[dict[str, Any]], asked: str, mode: str | None = None) -> float | None:
    """Of the moves that were asked for so and went this way, or any; None: none did."""
    took = [
        r["took_s"]
        for r in rows
        if r["asked"] == asked and r["outcome"] == "moved" and mode in (None, r["mode"])
    ]
    return statistics.median(took) if took else None


def forced_s(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Medians of each way; a request too short to be split has none of that."""
    return {way: median_s(rows, way, way) for way in WAYS}


def close(rows: list[dict[str, Any]]) -> bool:
    """Two ways are so near each other that a few moves do not tell which is faster."""
    seconds = sorted(s for s in forced_s(rows).values() if s is not None)
    return seconds[1] <= CLOSE * seconds[0]


def cell(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One link and context: medians of the forced ways, and the choice against them."""

    forced = forced_s(rows)
    known = {way: s for way, s in forced.items() if s is not None}
    chosen = [r["mode"] for r in rows if r["asked"] == "chosen"]
    mode = statistics.mode(chosen)
    errors = [
        abs(r["predicted_s"] - r["took_s"]) / r["took_s"]
        for r in rows
        if r["asked"] == "chosen" and r["outcome"] == "moved"
    ]
    better = min(s for way, s in known.items() if way != "split")
    worse = max(s for way, s in known.items() if way != "split")
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
    """A panel a link: milliseconds over context, each way a line, the chosen one ringed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    grid = results["grid"]
    figure, panels = plt.subplots(
        1, len(grid), figsize=(1 + 4.2 * len(grid), 4.4), squeeze=False, sharey=True
    )
    for axes, (link, cells) in zip(panels[0], grid.items(), strict=True):
        contexts = [int(n) for n in cells]
        for way, (color, mark) in LOOKS.items():
            points = [(int(n), c["forced_s"][way]) for n, c in cells.items()]
            known = [(n, 1e3 * s) for n, s in points if s is not None]
            if known:
                axes.plot(*zip(*known, strict=True), mark, ls="-", color=color, ms=5, label=way)
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
    parser.add_argument("--repeats", type=int, default=4, help="of each way and context")
    parser.add_argument("--more", type=int, default=8, help="where two ways are close")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="measure nothing: draw this")
    add_json_option(parser)
    return parser.parse_args()


def measured(link: str, contexts: list[int], repeats: int, more: int) -> dict[int, Any]:
    """Rows of moves, by context; more of them where ways are close to each other."""
    moves: dict[int, Any] = {n: [] for n in contexts}
    move_all(link, contexts, repeats, moves)
    move_all(link, [n for n in contexts if close(moves[n])], more, moves)
    return moves


def move_all(link: str, contexts: list[int], repeats: int, moves: dict[int, Any]) -> None:
    """One job of moves, added to what there is."""
    if not contexts or not repeats:
        return
    tell(f"{NAMES[link]}: contexts {contexts}, each way {repeats} times")
    for row in run(link, contexts, [*WAYS, None], repeats):
        moves[row["context"]].append(row)
    for n in contexts:
        ways = [f"{way} {1e3 * s:.1f}" for way, s in forced_s(moves[n]).items() if s is not None]
        tell(f"{n:6} tokens: {', '.join(ways)} ms; chosen: {cell(moves[n])['chosen']}")


def tell(line: str) -> None:
    """How far it has got: standard output is the result's."""
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
