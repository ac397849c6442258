"""MELL, the paper's policy: classes by size, few moves an operation, on `mell_plan.Plan`.

Workers are packed in groups that run the same models and have arenas of one size. The size of a
request is what it holds after one more `horizon_s`: overload is cured before it happens.
"""

from typing import Any

import numpy as np

from mellmpi.core.policies.base import idle_workers, more_workers, room_after
from mellmpi.core.policies.mell_plan import Plan
from mellmpi.core.view import Move, Proposal, View


def place(view: View, row: int, model: str) -> int | None:
    """Where Allocate puts it, if it fits there now; with no worker to open, the one with most room.

    Waiting for a worker to be woken is left to the cluster scheduler.
    """
    room = room_after(view, row, model)
    for group in _groups(view):
        if view.hosting(model)[group].any():
            workers, rows, plan = _plan(view, group, np.array([row]), room)
            if (target := plan.target([len(rows)])) is not None:
                return int(workers[target])
    worker = int(np.argmax(room))
    return worker if room[worker] >= 0 and not more_workers(view, model) else None


def rebalance(view: View) -> list[Proposal]:
    """One epoch: the moves by which the plan differs from what is, and the empty workers."""
    moves: list[Proposal] = []
    for group in _groups(view):
        workers, rows, plan = _plan(view, group)
        before = list(plan.where)
        plan.epoch()
        ids = view.requests.request_id[rows]
        moves += [Move(int(ids[i]), int(workers[b]), "mell")
                  for i, b in enumerate(plan.where[: len(rows)]) if b != before[i]]  # fmt: skip
    return moves + idle_workers(view)


def _groups(view: View) -> list[np.ndarray]:
    """Active workers by models and capacity, each group ascending."""
    groups: dict[tuple[bytes, int], list[int]] = {}
    for w in np.flatnonzero(view.active()).tolist():
        key = view.workers.runs[:, w].tobytes(), int(view.workers.capacity[w])
        groups.setdefault(key, []).append(w)
    return [np.array(group) for group in groups.values()]


def _plan(view: View, group: np.ndarray, extra: np.ndarray | None = None,
          room: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, Plan]:  # fmt: skip
    """The group as bins, its requests as items; the `extra` ones are in the last bin, of no use."""
    workers, requests = view.workers, view.requests
    extra = np.zeros(0, np.int64) if extra is None else extra
    rows = np.flatnonzero(requests.live & np.isin(requests.worker, group))
    capacity = float(workers.capacity[group[0]])
    items = np.concatenate([rows, extra])
    held = requests.kv_bytes(items)
    growth = np.maximum(view.token_rate * view.horizon_s, 1) * requests.token_bytes[items]
    where = np.concatenate([np.searchsorted(group, requests.worker[rows]),
                            np.full(len(extra), len(group))]).astype(int)  # fmt: skip
    known = np.bincount(where, weights=held, minlength=len(group) + 1)[:-1]
    other = np.maximum(0, workers.capacity[group] - workers.budget[group] - known) / capacity
    fits = workers.num_requests[group] < workers.max_requests[group]
    usable: Any = fits if room is None else fits & (room[group] >= 0)
    size = np.minimum(held + growth, capacity) / capacity
    return group, rows, Plan(size.tolist(), where.tolist(), (~requests.movable[items]).tolist(),
                             [*other.tolist(), 0.0], [*workers.activated[group].tolist(), 0],
                             [*usable.tolist(), False])  # fmt: skip
