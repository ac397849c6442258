"""The type of a policy, and functions that several policies use."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mellmpi.scheduler.view import ParkWorker, Proposal, View


@dataclass(frozen=True)
class Policy:
    """`place(view, row, model)` -> worker or None; `rebalance(view)` -> proposals.

    resumes_at_home  a preempted request resumes on the worker that preempted it
    """

    place: Callable[[View, int, str], int | None]
    rebalance: Callable[[View], list[Proposal]]
    resumes_at_home: bool = False


def without_moves(policy: Policy) -> Policy:
    """The same placement without migrations: empty workers park, preempted requests stay."""
    return Policy(policy.place, park_empty, resumes_at_home=True)


def free_after(view: View, row: int, model: str) -> np.ndarray:
    """int64 [workers + 1]: bytes free with this request placed there; below 0: it does not fit."""
    workers = view.workers
    fits = view.hosting(model) & (workers.num_requests < workers.max_requests)
    return np.where(fits, workers.budget - view.requests.need(row), -1)


def group_by_worker(view: View, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows sorted by worker, first), stable: rows[first[w] : first[w + 1]] are on worker w.

    first is int64 [workers + 2].
    """
    on = view.requests.worker[rows]
    order = np.argsort(on, kind="stable")
    first = np.searchsorted(on[order], np.arange(len(view.workers.state) + 1))
    return rows[order], first


def park_empty(view: View) -> list[Proposal]:
    """Park workers empty for `park_after_s`, but not the last active one; none while some wait."""
    workers = view.workers
    active = view.active()
    empty = active & (workers.num_requests == 0)
    ripe = empty & (view.now - workers.empty_since_s >= view.park_after_s)
    spare = int(active.sum()) - 1
    if view.waiting_bytes:
        return []
    return [ParkWorker(int(w)) for w in np.flatnonzero(ripe)[::-1][:spare]]
