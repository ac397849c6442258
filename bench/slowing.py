"""How soon do decisions change when a link becomes ten times slower during a run?

    python bench/slowing.py [--context 256] [--before 8] [--after 8] [--json FILE]

A request moves between two hosts again and again; the runtime chooses the mode. After some moves
the link changes from 10 Gbit/s to 1 Gbit/s (tc, while the job runs). Target: at most 3 moves over
the slow link have the mode of before. Needs root: two network namespaces.
"""

import argparse
from statistics import median
from typing import Any

from moving import run
from record import add_json_option, finish

FAST, SLOW = "10gbit", "1gbit"
BAR = 3  # most moves as before
SHIFT = 0.2  # change of the share of computed positions that counts as another mode


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The record of one move; `computed`: share of recomputed positions (0: transfer)."""
    return {
        "mode": row["mode"],
        "computed": round(min(1.0, row["start"] / row["context"]), 2),
        "predicted_ms": round(1e3 * row["predicted_s"], 1),
        "took_ms": round(1e3 * row["took_s"], 1),
    }


def verdict(before: list[float], after: list[float]) -> dict[str, Any]:
    """Compare shares of computed positions before and after the change of the link."""
    usual = median(before)
    same = next((i for i, share in enumerate(after) if abs(share - usual) >= SHIFT), len(after))
    return {"usual": usual, "moves_as_before": same, "bar": BAR, "holds": same <= BAR}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--before", type=int, default=8, help="moves over the fast link")
    parser.add_argument("--after", type=int, default=8, help="moves over the slow link")
    add_json_option(parser)
    args = parser.parse_args()
    rows = run(FAST, [args.context], [None], args.before + args.after, rates={args.before: SLOW})
    moves = [shown(row) for row in rows]
    before, after = moves[: args.before], moves[args.before :]
    shares = [[move["computed"] for move in part] for part in (before, after)]
    results = {"verdict": verdict(*shares), FAST: before, SLOW: after}
    config = {k: v for k, v in vars(args).items() if k != "json"}
    finish(config, results, args.json)


if __name__ == "__main__":
    main()
