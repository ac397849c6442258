"""Overflow, averted: who gives what to whom, and when one worker more is needed for it."""

import numpy as np

from mellmpi.core.ledger import WorkerState
from mellmpi.core.policies.frugal_fleet import (
    LEAD_TICKS,
    LEAVING,
    Fleet,
    least_s,
    price,
    sizes,
    strain_of,
)
from mellmpi.core.policies.kernels import relief
from mellmpi.core.view import Move, Proposal, View, WakeWorker

ENDS = 2.0  # no worker is woken for one where so many are expected to end before it overflows


def relieve(view: View, fleet: Fleet) -> tuple[list[Proposal], list[int]]:
    """Moves away from workers that overflow before the next round and a transfer are over.

    And the workers that have no place to give anything to, though they overflow sooner than
    another can be woken; of those that overflow later, one.
    """
    mean_bytes = int(view.requests.kv_bytes(fleet.rows).mean()) if len(fleet.rows) else 0
    lead_s = LEAD_TICKS * view.period_s + view.cost.transfer_s(mean_bytes)
    wake_s = lead_s + 2 * view.period_s + view.cost.wake_s
    fastest = np.maximum(fleet.growth, view.growth_Bps)
    crowded = np.flatnonzero((fleet.room < wake_s * fastest) & (view.workers.num_requests > 1))
    soon = fleet.room[crowded] < lead_s * fastest[crowded]
    proposals: list[Proposal] = []
    lacking: list[int] = []
    for worker in crowded[soon].tolist():
        if (rows := fleet.settled(view, worker)) is None:
            continue  # what is here has yet to arrive, or help is on its way
        found = (
            _best(view, fleet, worker, rows, max(least_s(view), lead_s))
            or _opening(view, fleet, worker, rows)
            or _best(view, fleet, worker, rows, lead_s)
        )
        if found:
            proposals.append(_moved(view, fleet, worker, *found))
        else:
            lacking.append(worker)
    left_s = fleet.room / np.maximum(fastest, 1e-9)
    later = crowded[~soon & (fleet.leaving[crowded] * left_s[crowded] < LEAVING * ENDS)]
    lacking = lacking or _will_lack(view, fleet.copy(), later.tolist())
    return proposals, lacking


def one_worker_more(view: View, fleet: Fleet, lacking: int) -> list[Proposal]:
    """Stop emptying a worker that could take something of the `lacking` one, or wake such a one.

    Nothing if one is waking, or is there and empty.
    """
    workers = view.workers
    helps = workers.runs[view.requests.model[fleet.on(lacking)]].any(axis=0)
    empty = view.active() & (workers.num_requests == 0)
    if (helps & (empty | (workers.state == WorkerState.WAKING))).any():
        return []
    for state in (WorkerState.DRAINING, WorkerState.PARKED):
        if (idle := helps & (workers.state == state)).any():
            return [WakeWorker(int(np.argmax(idle)))]
    return []


def _will_lack(view: View, fleet: Fleet, workers: list[int]) -> list[int]:
    """The first of these that has no good place left once the others have theirs.

    Who arrives meanwhile may take it: where waking costs next to nothing, one worker is kept ready.
    """
    if view.cost.wake_s <= view.period_s:
        return workers[:1]
    for worker in workers:
        if (rows := fleet.settled(view, worker)) is not None:
            if (found := _best(view, fleet, worker, rows, least_s(view))) is None:
                return [worker]
            _moved(view, fleet, worker, *found)
    return []


def _best(view: View, fleet: Fleet, worker: int, rows: np.ndarray, keep_s: float,
          may: np.ndarray | None = None) -> tuple[int, int] | None:  # fmt: skip
    """(row, destination) that leaves least strain and the destination so much time."""
    may = fleet.accepting(view) if may is None else may
    may[worker] = False
    i, dst = relief(*sizes(view, rows), view.workers.runs, fleet.room, fleet.growth,
                    fleet.leaving, may, worker, fleet.leaves, price(view, worker),
                    keep_s, strain_of(view))  # fmt: skip
    return (int(rows[i]), int(dst)) if dst else None


def _opening(view: View, fleet: Fleet, worker: int, rows: np.ndarray) -> tuple[int, int] | None:
    """A request to an empty worker."""
    empty = fleet.takes & (view.workers.num_requests == 0) & (fleet.seats > 0)
    return _best(view, fleet, worker, rows, 0.0, empty) if empty.any() else None


def _moved(view: View, fleet: Fleet, src: int, row: int, dst: int) -> Move:
    size, grow, _ = sizes(view, np.array([row]))
    fleet.give(size[0], grow[0], src, dst)
    fleet.takes[src] = False  # or one would undo what another did
    return Move(int(view.requests.request_id[row]), dst, "overflow")
