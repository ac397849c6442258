"""Moves all requests away from held workers, whatever the policy. A pure function of the view."""

import numpy as np

from mellmpi.scheduler.ledger import WorkerState
from mellmpi.scheduler.view import MoveProposal, Proposal, View, WakeWorker


def evacuation(view: View) -> list[Proposal]:
    """Moves to active workers with room, the smallest request first.

    A destination keeps a block for each of its requests to grow into; of several, the one with the
    most memory left. For requests that fit nowhere a draining or parked worker becomes active.
    """
    workers, requests = view.workers, view.requests
    if not (workers.state == WorkerState.HELD).any():
        return []  # the most frequent case
    rows = np.flatnonzero(requests.movable & (workers.state[requests.worker] == WorkerState.HELD))
    sizes = requests.kv_bytes(rows)
    free = workers.budget - workers.num_requests * workers.block_bytes
    slots = workers.max_requests - workers.num_requests
    proposals: list[Proposal] = []
    lacking: dict[str, int] = {}  # model -> bytes of its smallest request without a destination
    order = np.argsort(sizes, kind="stable")
    for row, size in zip(rows[order].tolist(), sizes[order].tolist(), strict=True):
        model = workers.models[requests.model[row]]
        left = np.where(view.hosting(model) & (slots > 0), free - size, -1)
        dst = int(np.argmax(left))
        if left[dst] < 0:
            lacking.setdefault(model, size)
            continue
        free[dst] -= size + workers.block_bytes[dst]
        slots[dst] -= 1
        proposals.append(MoveProposal(int(requests.request_id[row]), dst, "drained by an operator"))
    wakes = [_worker_to_activate(view, model, size) for model, size in lacking.items()]
    return proposals + [WakeWorker(worker) for worker in dict.fromkeys(wakes) if worker]


def _worker_to_activate(view: View, model: str, size: int) -> int:
    """A draining worker with room for a request of `size` bytes, else a parked one; 0: none.

    0 also while a worker that hosts the model is waking.
    """
    workers = view.workers
    able = workers.able(model) & ~workers.held
    if (able & (workers.state == WorkerState.WAKING)).any():
        return 0
    slots = workers.num_requests < workers.max_requests
    draining = (workers.state == WorkerState.DRAINING) & (workers.budget >= size) & slots
    parked = (workers.state == WorkerState.PARKED) & (workers.capacity >= size)
    for found in (able & draining, able & parked):
        if found.any():
            return int(np.argmax(found))
    return 0
