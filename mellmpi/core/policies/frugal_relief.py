"""Overflow, averted: who gives what to whom, and when one worker more is needed for it."""

import numpy as np

from mellmpi.core.ledger import WorkerState
from mellmpi.core.policies.frugal_fleet import (
    LEAD_TICKS,
    LEAVING,
    PRICE,
    Fleet,
    least_s,
    sizes,
    strain_of,
)
from mellmpi.core.policies.kernels import relief
from mellmpi.core.view import Move, Proposal, View, WakeWorker

ENDS = 2.0  # no worker is woken for one where so many are expected to end before it overflows


def relieve(view: View, fleet: Fleet) -> tuple[list[Proposal], bool]:
    """Moves away from workers that overflow before the next round and a transfer are over.

    And whether a worker that will overflow later, but sooner than one can be woken, has no place
    to give anything to.
    """
    mean_bytes = int(view.requests.kv_bytes(fleet.rows).mean()) if len(fleet.rows) else 0
    lead_s = LEAD_TICKS * view.period_s + view.cost.transfer_s(mean_bytes)
    wake_s = lead_s + 2 * view.period_s + view.cost.wake_s
    fastest = np.maximum(fleet.growth, view.growth_Bps)
    crowded = np.flatnonzero((fleet.room < wake_s * fastest) & (view.workers.num_requests > 1))
    soon = fleet.room[crowded] < lead_s * fastest[crowded]
    proposals: list[Proposal] = []
    lacking = False
    for worker in crowded[soon].tolist():
        if (rows := fleet.settled(view, worker)) is None:
            continue  # what is here has yet to arrive, or help is on its way
        found = (
            _best(view, fleet, worker, rows, max(least_s(view), lead_s))
            or _opening(view, fleet, worker, rows)
            or _best(view, fleet, worker, rows, lead_s)
        )
        lacking |= found is None
        proposals += [_moved(view, fleet, worker, *found)] if found else []
    left_s = fleet.room / np.maximum(fastest, 1e-9)
    later = crowded[~soon & (fleet.leaving[crowded] * left_s[crowded] < LEAVING * ENDS)]
    lacking = lacking or _will_lack(view, fleet.copy(), later.tolist())
    return proposals, lacking


def one_worker_more(view: View) -> list[Proposal]:
    """Stop emptying a worker, or wake one; nothing if one is waking already."""
    workers = view.workers
    if workers.workers(WorkerState.WAKING) or (view.active() & (workers.num_requests == 0)).any():
        return []
    idle = workers.workers(WorkerState.DRAINING) or workers.workers(WorkerState.PARKED)
    return [WakeWorker(w) for w in idle[:1]]


def _will_lack(view: View, fleet: Fleet, workers: list[int]) -> bool:
    """Is there, for one of these, no good place left once the others have theirs?

    Who arrives meanwhile may take it: where waking costs next to nothing, one worker is kept ready.
    """
    if view.cost.wake_s <= view.period_s:
        return bool(workers)
    for worker in workers:
        if (rows := fleet.settled(view, worker)) is not None:
            if (found := _best(view, fleet, worker, rows, least_s(view))) is None:
                return True
            _moved(view, fleet, worker, *found)
    return False


def _best(view: View, fleet: Fleet, worker: int, rows: np.ndarray, keep_s: float,
          may: np.ndarray | None = None) -> tuple[int, int] | None:  # fmt: skip
    """(row, destination) that leaves least strain and the destination so much time."""
    may = fleet.accepting(view) if may is None else may
    may[worker] = False
    price = PRICE / float(view.workers.capacity[worker])
    i, dst = relief(*sizes(view, rows), view.workers.runs, fleet.room, fleet.growth,
                    fleet.leaving, may, worker, fleet.leaves, price, keep_s,
                    strain_of(view))  # fmt: skip
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
