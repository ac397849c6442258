"""Frugal: as few workers as hold the load, with room for it to grow.

Placement is best fit that leaves room for a few seconds of growth. A worker that is about to
overflow gives its smallest sufficient request away; the emptiest worker is drained and parked
as soon as its requests fit elsewhere, again with room to grow.
"""

import numpy as np

from mellmpi.core.ledger import WorkerState
from mellmpi.core.policies.base import idle_workers, room_after
from mellmpi.core.view import Drain, Move, Proposal, View, WakeWorker

# Placement keeps room for one horizon of growth (View.horizon_s).
RELIEVE = 0.5  # a worker that would overflow within this share of it gives something away
DRAIN = 2.0  # more room before a worker is emptied: no moving to and fro
FULL = np.iinfo(np.int64).max


def place(view: View, row: int, model: str) -> int | None:
    """The fullest worker with room to grow; any worker with room if none can be woken."""
    room = room_after(view, row, model)
    spare = np.where(room >= 0, room - growth_room(view, view.horizon_s), -1)
    if (spare >= 0).any():
        return int(np.argmin(np.where(spare >= 0, spare, FULL)))
    worker = int(np.argmax(room))
    alone = not view.workers.num_requests[worker]  # an empty worker is all the room there is
    return worker if room[worker] >= 0 and (alone or not _more_workers(view)) else None


def rebalance(view: View) -> list[Proposal]:
    """One thing at a time: avert overflow, else empty a worker, else park the empty ones."""
    return _relieve(view) or _go_on_draining(view) or _drain(view) or idle_workers(view)


def growth_room(view: View, horizon_s: float) -> np.ndarray:
    """int64 [workers + 1]: bytes to keep free; half a block a request until rates are known."""
    floor = view.workers.num_requests * view.workers.block_bytes // 2
    return np.maximum((view.growth_Bps * horizon_s).astype(np.int64), floor)


def _more_workers(view: View) -> bool:
    """Can waiting bring a worker that is not active now?"""
    coming = (WorkerState.PARKED, WorkerState.WAKING, WorkerState.PARKING, WorkerState.DRAINING)
    return bool(np.isin(view.workers.state, coming).any())


def _spare(view: View, horizon_s: float) -> np.ndarray:
    """int64 [workers + 1]: bytes each active worker could take and still grow; else -1."""
    workers = view.workers
    open_ = view.active() & (workers.num_requests < workers.max_requests)
    return np.where(open_, workers.budget - growth_room(view, horizon_s), -1)


def _best_fit(spare: np.ndarray, need: int) -> int | None:
    worker = int(np.argmin(np.where(spare >= need, spare, FULL)))
    return worker if spare[worker] >= need else None


def _rows_on(view: View, worker: int) -> np.ndarray:
    return np.flatnonzero(view.requests.live & (view.requests.worker == worker))


def _relieve(view: View) -> list[Proposal]:
    """For each worker that is about to overflow, the smallest request that cures it."""
    lack = growth_room(view, RELIEVE * view.horizon_s) - view.workers.budget
    proposals: list[Proposal] = []
    spare = _spare(view, view.horizon_s)
    for worker in np.flatnonzero((lack > 0) & (view.workers.num_requests > 1)):
        rows = _rows_on(view, int(worker))
        if not len(rows) or not view.requests.movable[rows].all():
            continue  # help is on its way
        sizes = view.requests.kv_bytes(rows)
        enough = sizes >= lack[worker]
        i = int(np.argmin(np.where(enough, sizes, FULL)) if enough.any() else np.argmax(sizes))
        spare[worker] = -1
        if (dst := _best_fit(spare, int(sizes[i]))) is not None:
            spare[dst] -= sizes[i]
            proposals.append(Move(int(view.requests.request_id[rows[i]]), dst, "overflow"))
        else:
            proposals += [WakeWorker(w) for w in view.workers.workers(WorkerState.PARKED)[:1]]
    return proposals


def _go_on_draining(view: View) -> list[Proposal]:
    """What is still on a draining worker, as far as it fits elsewhere."""
    proposals: list[Proposal] = []
    spare = _spare(view, view.horizon_s)
    for worker in view.workers.workers(WorkerState.DRAINING):
        for row in _rows_on(view, worker):
            need = int(view.requests.kv_bytes(np.array([row]))[0])
            if view.requests.movable[row] and (dst := _best_fit(spare, need)) is not None:
                spare[dst] -= need
                proposals.append(Move(int(view.requests.request_id[row]), dst, "drain"))
    return proposals


def _drain(view: View) -> list[Proposal]:
    """Empty the worker that holds least, if all that it holds fits elsewhere with room to grow."""
    workers, requests = view.workers, view.requests
    if view.waiting_bytes or (workers.state == WorkerState.DRAINING).any():
        return []
    used = np.where(view.active() & (workers.num_requests > 0), workers.capacity - workers.budget,
                    FULL)  # fmt: skip
    victim = int(np.argmin(used))
    placed = requests.live & (requests.worker > 0)
    if used[victim] == FULL or not requests.movable[placed].all():
        return []  # nothing to drain, or something is still moving
    rows = _rows_on(view, victim)
    if not len(rows):
        return []
    sizes = requests.kv_bytes(rows)
    growth = int(
        view.growth_Bps[victim] / len(rows) * DRAIN * view.horizon_s
    )  # of one of its requests
    spare, seats = _spare(view, DRAIN * view.horizon_s), workers.max_requests - workers.num_requests
    spare[victim] = -1
    moves: list[Proposal] = []
    for i in np.argsort(-sizes):
        dst = _best_fit(np.where(seats > 0, spare, -1), int(sizes[i]) + growth)
        if dst is None:
            return []
        spare[dst] -= int(sizes[i]) + growth
        seats[dst] -= 1
        moves.append(Move(int(requests.request_id[rows[i]]), dst, "drain"))
    return [Drain(victim), *moves]
