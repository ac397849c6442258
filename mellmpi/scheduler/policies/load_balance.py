"""Load balance: worst fit, and migrations from crowded workers to free ones.

After Llumnix (OSDI 2024): the freeness of a worker is the number of decode steps until it
overflows. The least free worker is paired with the freest, the next with the next; within a pair
one request moves if that reduces the difference. On overflow the youngest request is preempted and
resumes on any worker with room, as in Llumnix.
"""

import numpy as np

from mellmpi.scheduler.ledger import WorkerState
from mellmpi.scheduler.policies import worst_fit
from mellmpi.scheduler.policies.base import group_by_worker, park_empty
from mellmpi.scheduler.view import MoveProposal, Proposal, View

CROWDED = 60.0  # steps: a worker with lower freeness gives a request away
FREE = 120.0  # steps: a worker with higher freeness takes one

place = worst_fit.place


def rebalance(view: View) -> list[Proposal]:
    """At most one move for each pair of a crowded and a free worker; without moves, park."""
    return _balance(view) or park_empty(view)


def freeness(budget: np.ndarray, num_requests: np.ndarray, token_bytes: np.ndarray) -> np.ndarray:
    """float64: decode steps until each worker overflows; a step adds one position a request."""
    return np.asarray(budget / np.maximum(num_requests, 1) / np.maximum(token_bytes, 1e-9))


def _balance(view: View) -> list[Proposal]:
    workers = view.workers
    steps = freeness(workers.budget, workers.num_requests, workers.token_bytes)
    giving = view.active() | (workers.state == WorkerState.DRAINING)
    crowded = np.flatnonzero(giving & (workers.num_requests > 1) & (steps < CROWDED))
    free = np.flatnonzero(
        view.active() & (workers.num_requests < workers.max_requests) & (steps > FREE)
    )
    if not len(crowded) or not len(free):
        return []
    crowded = crowded[np.argsort(steps[crowded], kind="stable")]
    free = free[np.argsort(-steps[free], kind="stable")]
    rows, first = group_by_worker(view, np.flatnonzero(view.requests.movable))
    moves = [
        _move(view, rows[first[src] : first[src + 1]], int(src), int(dst))
        for src, dst in zip(crowded, free, strict=False)
    ]
    return [move for move in moves if move is not None]


def _move(view: View, rows: np.ndarray, src: int, dst: int) -> MoveProposal | None:
    """Move the smallest request after which `dst` is still at least as free as `src`."""
    workers, requests = view.workers, view.requests
    runs = workers.runs[requests.model[rows], dst]
    sizes = requests.kv_bytes(rows)
    left = workers.budget[dst] - sizes
    after_src = freeness(
        workers.budget[src] + sizes, workers.num_requests[src] - 1, workers.token_bytes[src]
    )
    after_dst = freeness(left, workers.num_requests[dst] + 1, workers.token_bytes[dst])
    good = runs & (left >= 0) & (after_dst >= after_src)
    if not good.any():
        return None
    i = int(np.argmin(np.where(good, sizes, np.iinfo(np.int64).max)))
    return MoveProposal(int(requests.request_id[rows[i]]), dst, "balance", "transfer")
