"""How soon does a link that slows down ten times in mid-run change what is decided?

    python bench/slowing.py [--context 256] [--before 8] [--after 8] [--json FILE]

A request moves from one host to the other again and again, as the runtime chooses. After some
moves the link goes from 10 Gbit/s to 1 Gbit/s (tc, while the job runs). Bar: within 3 moves over
the slow link the next one goes another way. Needs root: two network namespaces.
"""

import argparse
from statistics import median
from typing import Any

from moving import run
from record import add_json_option, finish

FAST, SLOW = "10gbit", "1gbit"
BAR = 3
SHIFT = 0.2  # of the positions, to be computed rather than sent: it goes another way


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Of one move; `computed` is the share of its positions: 0 transfer, 1 recompute."""
    return {
        "mode": row["mode"],
        "computed": round(min(1.0, row["start"] / row["context"]), 2),
        "predicted_ms": round(1e3 * row["predicted_s"], 1),
        "took_ms": round(1e3 * row["took_s"], 1),
    }


def verdict(before: list[float], after: list[float]) -> dict[str, Any]:
    """Shares computed, before and after the change: how many moves went on as before."""
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
