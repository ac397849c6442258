"""What a policy is, and what several of them share."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mellmpi.scheduler.view import ParkWorker, Proposal, View


@dataclass(frozen=True)
class Policy:
    """`place(view, row, model)` -> worker or None; `rebalance(view)` -> proposals."""

    place: Callable[[View, int, str], int | None]
    rebalance: Callable[[View], list[Proposal]]
    resumes_at_home: bool = False  # who was preempted waits for room on the same worker


def without_moves(policy: Policy) -> Policy:
    """The same placement; nothing is ever moved, and workers park when they are empty."""
    return Policy(policy.place, idle_workers, resumes_at_home=True)


def room_after(view: View, row: int, model: str) -> np.ndarray:
    """int64 [workers + 1]: bytes left on each worker with this request on it; under 0: no place."""
    workers = view.workers
    fits = view.hosting(model) & (workers.num_requests < workers.max_requests)
    return np.where(fits, workers.budget - view.requests.need(row), -1)


def by_worker(view: View, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows in the order of their workers, first): rows[first[w] : first[w + 1]] are on worker w.

    first is int64 [workers + 2]. Order within a worker is kept.
    """
    on = view.requests.worker[rows]
    order = np.argsort(on, kind="stable")
    first = np.searchsorted(on[order], np.arange(len(view.workers.state) + 1))
    return rows[order], first


def idle_workers(view: View) -> list[Proposal]:
    """Park what has been empty for long enough, but never the last active worker."""
    workers = view.workers
    active = view.active()
    empty = active & (workers.num_requests == 0)
    ripe = empty & (view.now - workers.empty_since_s >= view.park_after_s)
    spare = int(active.sum()) - 1
    if view.waiting_bytes:
        return []
    return [ParkWorker(int(w)) for w in np.flatnonzero(ripe)[::-1][:spare]]
