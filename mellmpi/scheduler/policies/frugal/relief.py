"""Overflow, averted: who gives what to whom, and when one worker more is needed for it."""

import numpy as np

from mellmpi.scheduler.ledger import WorkerState
from mellmpi.scheduler.policies.frugal.forecast import (
    LEAD_TICKS,
    LEAVING,
    CapacityForecast,
    least_s,
    price,
    sizes,
    strain_of,
)
from mellmpi.scheduler.policies.kernels import relief
from mellmpi.scheduler.view import MoveProposal, Proposal, View, WakeWorker

ENDS = 2.0  # no worker is woken for one where so many are expected to end before it overflows


def relieve(view: View, forecast: CapacityForecast) -> tuple[list[Proposal], list[int]]:
    """Moves away from workers that overflow before the next round and a transfer are over.

    And the workers that have no place to give anything to, though they overflow sooner than
    another can be woken; of those that overflow later, one.
    """
    mean_bytes = int(view.requests.kv_bytes(forecast.rows).mean()) if len(forecast.rows) else 0
    lead_s = LEAD_TICKS * view.period_s + view.cost.transfer_s(mean_bytes)
    wake_s = lead_s + 2 * view.period_s + view.cost.wake_s
    fastest = np.maximum(forecast.growth, view.growth_Bps)
    crowded = np.flatnonzero((forecast.room < wake_s * fastest) & (view.workers.num_requests > 1))
    soon = forecast.room[crowded] < lead_s * fastest[crowded]
    proposals: list[Proposal] = []
    lacking: list[int] = []
    for worker in crowded[soon].tolist():
        if (rows := forecast.settled(view, worker)) is None:
            continue  # what is here has yet to arrive, or help is on its way
        found = (
            _best(view, forecast, worker, rows, max(least_s(view), lead_s))
            or _opening(view, forecast, worker, rows)
            or _best(view, forecast, worker, rows, lead_s)
        )
        if found:
            proposals.append(_moved(view, forecast, worker, *found))
        else:
            lacking.append(worker)
    left_s = forecast.room / np.maximum(fastest, 1e-9)
    later = crowded[~soon & (forecast.leaving[crowded] * left_s[crowded] < LEAVING * ENDS)]
    lacking = lacking or _will_lack(view, forecast.copy(), later.tolist())
    return proposals, lacking


def one_worker_more(view: View, forecast: CapacityForecast, lacking: int) -> list[Proposal]:
    """Stop emptying a worker that could take something of the `lacking` one, or wake such a one.

    Nothing if one is waking, or is there and empty.
    """
    workers = view.workers
    helps = workers.runs[view.requests.model[forecast.on(lacking)]].any(axis=0)
    empty = view.active() & (workers.num_requests == 0)
    if (helps & (empty | (workers.state == WorkerState.WAKING))).any():
        return []
    for state in (WorkerState.DRAINING, WorkerState.PARKED):
        if (idle := helps & (workers.state == state)).any():
            return [WakeWorker(int(np.argmax(idle)))]
    return []


def _will_lack(view: View, forecast: CapacityForecast, workers: list[int]) -> list[int]:
    """The first of these that has no good place left once the others have theirs.

    Who arrives meanwhile may take it: where waking costs next to nothing, one worker is kept ready.
    """
    if view.cost.wake_s <= view.period_s:
        return workers[:1]
    for worker in workers:
        if (rows := forecast.settled(view, worker)) is not None:
            if (found := _best(view, forecast, worker, rows, least_s(view))) is None:
                return [worker]
            _moved(view, forecast, worker, *found)
    return []


def _best(
    view: View,
    forecast: CapacityForecast,
    worker: int,
    rows: np.ndarray,
    keep_s: float,
    may: np.ndarray | None = None,
) -> tuple[int, int] | None:
    """(row, destination) that leaves least strain and the destination so much time."""
    may = forecast.accepting(view) if may is None else may
    may[worker] = False
    i, dst = relief(
        *sizes(view, rows),
        view.workers.runs,
        forecast.room,
        forecast.growth,
        forecast.leaving,
        may,
        worker,
        forecast.leaves,
        price(view, worker),
        keep_s,
        strain_of(view),
    )
    return (int(rows[i]), int(dst)) if dst else None


def _opening(
    view: View, forecast: CapacityForecast, worker: int, rows: np.ndarray
) -> tuple[int, int] | None:
    """A request to an empty worker."""
    empty = forecast.takes & (view.workers.num_requests == 0) & (forecast.seats > 0)
    return _best(view, forecast, worker, rows, 0.0, empty) if empty.any() else None


def _moved(view: View, forecast: CapacityForecast, src: int, row: int, dst: int) -> MoveProposal:
    size, grow, _ = sizes(view, np.array([row]))
    forecast.give(size[0], grow[0], src, dst)
    forecast.takes[src] = False  # or one would undo what another did
    return MoveProposal(int(view.requests.request_id[row]), dst, "overflow")
