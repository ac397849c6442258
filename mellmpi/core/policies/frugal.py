"""Frugal: as few workers as hold the load, with room for it to grow.

Placement is best fit that leaves room for a few seconds of growth. A worker that is about to
overflow gives its smallest sufficient request away; the emptiest workers are drained and parked
as soon as their requests fit elsewhere, again with room to grow. The three ask for different
amounts of room (RELIEVE < placement < DRAIN), so that one does not undo what another did.
"""

import numpy as np

from mellmpi.core.ledger import WorkerState
from mellmpi.core.policies.base import idle_workers, room_after
from mellmpi.core.view import Drain, Move, Proposal, View, WakeWorker

# In horizons of growth (View.horizon_s). Placement keeps one.
RELIEVE = 0.5  # a worker with less gives something away
DRAIN = 2.0  # with so much elsewhere, a worker is emptied
FULL = np.iinfo(np.int64).max


def place(view: View, row: int, model: str) -> int | None:
    """The fullest worker with room to grow, while others can be woken; else one that is spared.

    Where every worker is active already, what overflows can only be preempted: then the queue
    waits, rather than fill the last room of those that run.
    """
    room = room_after(view, row, model)
    keep = growth_room(view, view.horizon_s)
    if not _more_workers(view, model):
        keep = np.maximum(keep, _answers_room(view))
    spare = np.where(room >= 0, room - keep, -1)
    worker = int(np.argmin(np.where(spare >= 0, spare, FULL)))
    if spare[worker] >= 0:
        return worker
    worker = int(np.argmax(room))
    alone = not view.workers.num_requests[worker]  # an empty worker is all the room there is
    return worker if room[worker] >= 0 and alone else None


def rebalance(view: View) -> list[Proposal]:
    """Avert overflow and go on with what is being emptied; else empty more, else park."""
    return _relieve(view) or _go_on_draining(view) or _drain(view) or _park(view)


def growth_room(view: View, horizon_s: float) -> np.ndarray:
    """int64 [workers + 1]: bytes to keep free; half a block a request until rates are known."""
    floor = view.workers.num_requests * view.workers.block_bytes // 2
    return np.asarray(np.maximum((view.growth_Bps * horizon_s).astype(np.int64), floor))


def _answers_room(view: View) -> np.ndarray:
    """int64 [workers + 1]: bytes for half an answer of every request, what is left on average."""
    workers = view.workers
    return np.asarray(
        (workers.num_requests * workers.token_bytes * (view.answer_tokens / 2)).astype(np.int64)
    )


class Room:
    """What active workers can take and still grow; less after each `take`."""

    def __init__(self, view: View, horizon_s: float):
        workers = view.workers
        self.spare = np.where(view.active(), workers.budget - growth_room(view, horizon_s), -1)
        self._seats = workers.max_requests - workers.num_requests
        self.taken = np.zeros(len(workers.state), bool)  # something is to come here

    def take(self, num_bytes: int) -> int | None:
        """The fullest worker with so much to spare, which is spoken for now; or None."""
        fits = (self.spare >= num_bytes) & (self._seats > 0)
        worker = int(np.argmin(np.where(fits, self.spare, FULL)))
        if not fits[worker]:
            return None
        self.spare[worker] -= num_bytes
        self._seats[worker] -= 1
        self.taken[worker] = True
        return worker


def _more_workers(view: View, model: str) -> bool:
    """Can waiting bring a worker that is not active now?"""
    workers = view.workers
    coming = (workers.state > WorkerState.ACTIVE) & (workers.state < WorkerState.LOST)
    return bool((workers.able(model) & coming).any())


def _rows_on(view: View, worker: int) -> np.ndarray:
    return np.flatnonzero(view.requests.live & (view.requests.worker == worker))


def _relieve(view: View) -> list[Proposal]:
    """For each worker that is about to overflow, the smallest request that cures it."""
    lack = growth_room(view, RELIEVE * view.horizon_s) - view.workers.budget
    short = (lack > 0) & (view.workers.num_requests > 1)
    proposals: list[Proposal] = []
    room = Room(view, view.horizon_s)  # nothing on those that are short: they lack even half of it
    for worker in np.flatnonzero(short):
        rows = _rows_on(view, int(worker))
        if not len(rows) or not view.requests.movable[rows].all():
            continue  # what is here has yet to arrive, or help is on its way
        sizes = view.requests.kv_bytes(rows)
        enough = sizes >= lack[worker]
        i = int(np.argmin(np.where(enough, sizes, FULL)) if enough.any() else np.argmax(sizes))
        if (dst := room.take(int(sizes[i]))) is None:
            return proposals + _one_worker_more(view)
        proposals.append(Move(int(view.requests.request_id[rows[i]]), dst, "overflow"))
    return proposals


def _one_worker_more(view: View) -> list[Proposal]:
    """Stop emptying a worker, or wake one; nothing if one is waking already."""
    workers = view.workers
    if workers.workers(WorkerState.WAKING):
        return []
    idle = workers.workers(WorkerState.DRAINING) or workers.workers(WorkerState.PARKED)
    return [WakeWorker(w) for w in idle[:1]]


def _go_on_draining(view: View) -> list[Proposal]:
    """What is still on a draining worker, as far as it fits elsewhere."""
    proposals: list[Proposal] = []
    room = Room(view, view.horizon_s)
    for worker in view.workers.workers(WorkerState.DRAINING):
        rows = _rows_on(view, worker)
        rows = rows[view.requests.movable[rows]]
        for row, size in zip(rows, view.requests.kv_bytes(rows), strict=True):
            if (dst := room.take(int(size))) is not None:
                proposals.append(Move(int(view.requests.request_id[row]), dst, "drain"))
    return proposals


def _drain(view: View) -> list[Proposal]:
    """Empty the workers that hold least, one after the other, while what they hold fits elsewhere.

    Short answers leave many workers almost empty within a moment: one a round would lag behind.
    """
    workers, requests = view.workers, view.requests
    if view.waiting_bytes or (workers.state == WorkerState.DRAINING).any():
        return []
    if not requests.movable[requests.live].all():
        return []  # something is still moving
    busy = view.active() & (workers.num_requests > 0)
    room = Room(view, DRAIN * view.horizon_s)
    room.spare[~busy] = -1  # to move into an empty worker would gain nothing
    held = np.where(busy, workers.capacity - workers.budget, FULL)
    proposals: list[Proposal] = []
    for victim in np.argsort(held, kind="stable")[: int(busy.sum()) - 1]:
        if room.taken[victim] or not (moves := _empty(view, int(victim), room)):
            break  # the next ones hold more
        proposals += [Drain(int(victim)), *moves]
    return proposals


def _empty(view: View, victim: int, room: Room) -> list[Proposal]:
    """All moves away from this worker, or none; `room` has less then, and nothing on the victim."""
    rows = _rows_on(view, victim)
    if len(rows) == 0:
        return []  # what it holds has yet to arrive
    growth = int(view.growth_Bps[victim] / len(rows) * DRAIN * view.horizon_s)  # of one request
    room.spare[victim] = -1
    moves: list[Proposal] = []
    sizes = view.requests.kv_bytes(rows)
    for i in np.argsort(-sizes):
        if (dst := room.take(int(sizes[i]) + growth)) is None:
            return []
        moves.append(Move(int(view.requests.request_id[rows[i]]), dst, "drain"))
    return moves


def _park(view: View) -> list[Proposal]:
    """The empty workers, unless one of the others may soon need them."""
    lack = growth_room(view, view.horizon_s) > view.workers.budget
    return [] if (lack & (view.workers.num_requests > 0)).any() else idle_workers(view)
