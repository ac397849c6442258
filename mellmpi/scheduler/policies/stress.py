"""`--migrate stress`: random migrations in every mode, every round. For tests only."""

import numpy as np

from mellmpi.scheduler.view import MoveProposal, Proposal, View

MOVES_PER_ROUND = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _random(seed: int, tick: int, i: int) -> int:
    """64 pseudo-random bits that depend on the arguments alone (splitmix64)."""
    x = (seed * 0xD1B54A32D192ED03 + tick * 0x2545F4914F6CDD1D + (i + 1) * _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def rebalance(view: View) -> list[Proposal]:
    """Moves of random movable requests, each to a random other active worker."""
    rows = np.flatnonzero(view.requests.movable)
    workers = np.flatnonzero(view.active())
    if not len(rows) or len(workers) < 2:
        return []
    proposals: list[Proposal] = []
    for i in range(MOVES_PER_ROUND):
        bits = _random(view.seed, view.tick, i)
        row = rows[bits % len(rows)]
        others = workers[workers != view.requests.worker[row]]
        dst = others[(bits >> 24) % len(others)]
        mode = ("transfer", "transfer", "recompute", "split")[bits >> 62]
        proposals.append(MoveProposal(int(view.requests.request_id[row]), int(dst), "stress", mode))
    return proposals
