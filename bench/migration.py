"""How long is the pause of a request that moves live, and how much slower are the others?

    python bench/migration.py [--contexts 256 8000] [--moves 40] [--others 4] [--crowded 1]
                              [--link 10gbit] [--json FILE]

Pause: from the last token of the source to the first token of the destination, less one normal
step of that request, in steps. Bars: median 1, 99th percentile 3. Others: relative increase of
their time per token during a move over the time just before it. Bar: 10 %, if a core is free: with
`--crowded 1` only worker 1 decodes other requests, and worker 2 leaves most of its core idle.
"""

import argparse
from typing import Any

import numpy as np
from moving import LINKS, run
from record import add_json_option, finish

BARS = {"p50": 1.0, "p99": 3.0}
ROUND = 10  # moves of one request, in alternating directions


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the moves of one context."""
    moved = [row for row in rows if row["outcome"] == "moved"]
    steps = np.array([row["pause_s"] / row["step_s"] - 1 for row in moved])
    found = {f"p{q}": round(float(np.percentile(steps, q)), 2) for q in (50, 99)}
    return {
        "moves": len(moved),
        "failed": len(rows) - len(moved),
        "step_ms": round(1e3 * float(np.median([row["step_s"] for row in moved])), 2),
        "pause_ms": round(1e3 * float(np.median([row["pause_s"] for row in moved])), 2),
        "took_ms": round(1e3 * float(np.median([row["took_s"] for row in moved])), 2),
        "downtime_steps": found,
        "others_slower": {"source": slower(moved, "src"), "destination": slower(moved, "dst")},
        "holds": all(found[name] <= bar for name, bar in BARS.items()),
    }


def slower(rows: list[dict[str, Any]], end: str) -> float | None:
    """Return the relative increase of the others' time per token, median of the moves."""
    pairs = [row[f"others_{end}"] for row in rows if row[f"others_{end}"]]
    return round(float(np.median([b / a - 1 for a, b in pairs])), 3) if pairs else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 8000])
    parser.add_argument("--moves", type=int, default=40, help="moves of each context")
    parser.add_argument(
        "--others", type=int, default=4, help="other requests on each crowded worker"
    )
    parser.add_argument(
        "--crowded", type=int, nargs="+", default=[1, 2], help="workers that decode other requests"
    )
    parser.add_argument("--link", choices=LINKS, default="shm")
    parser.add_argument("--mode", choices=("transfer", "split"), default="transfer")
    add_json_option(parser)
    args = parser.parse_args()
    rounds = max(1, args.moves // ROUND)
    rows = run(
        args.link,
        args.contexts,
        [args.mode] * ROUND,
        rounds,
        args.others,
        crowded=tuple(args.crowded),
    )
    results = {
        str(context): summary([row for row in rows if row["context"] == context])
        for context in args.contexts
    }
    config = {k: v for k, v in vars(args).items() if k != "json"}
    finish(config, results, args.json)


if __name__ == "__main__":
    main()
