"""Relief: move requests away from workers that are about to overflow; activate workers for it."""

import numpy as np

from mellmpi.scheduler.ledger import WorkerState
from mellmpi.scheduler.policies.frugal.forecast import (
    END_WEIGHT,
    LEAD_ROUNDS,
    CapacityForecast,
    cost_params,
    min_overflow_s,
    move_price,
    request_columns,
)
from mellmpi.scheduler.policies.kernels import best_relief
from mellmpi.scheduler.view import MoveProposal, Proposal, View, WakeWorker

EXPECTED_ENDS = 2.0  # no worker is woken for one on which so many requests end before it overflows


def relieve(view: View, forecast: CapacityForecast) -> tuple[list[Proposal], list[int]]:
    """(moves, workers that lack a destination).

    Moves are for workers that overflow before the next round and a transfer are over. Of workers
    that overflow later, but before another could be woken, at most one is said to lack a
    destination, and only if none of the former does.
    """
    mean_bytes = int(view.requests.kv_bytes(forecast.rows).mean()) if len(forecast.rows) else 0
    lead_s = LEAD_ROUNDS * view.period_s + view.cost.transfer_s(mean_bytes)
    wake_s = lead_s + 2 * view.period_s + view.cost.wake_s
    fastest = np.maximum(forecast.growth, view.growth_Bps)
    crowded = np.flatnonzero((forecast.free < wake_s * fastest) & (view.workers.num_requests > 1))
    soon = forecast.free[crowded] < lead_s * fastest[crowded]
    proposals: list[Proposal] = []
    lacking: list[int] = []
    for worker in crowded[soon].tolist():
        if (rows := forecast.movable_rows(view, worker)) is None:
            continue
        move = (
            _best(view, forecast, worker, rows, max(min_overflow_s(view), lead_s))
            or _to_empty_worker(view, forecast, worker, rows)
            or _best(view, forecast, worker, rows, lead_s)
        )
        if move:
            proposals.append(_record(view, forecast, worker, *move))
        else:
            lacking.append(worker)
    left_s = forecast.free / np.maximum(fastest, 1e-9)
    ends = forecast.end_rate[crowded] * left_s[crowded]
    later = crowded[~soon & (ends < END_WEIGHT * EXPECTED_ENDS)]
    lacking = lacking or _will_lack(view, forecast.copy(), later.tolist())
    return proposals, lacking


def activate_worker(view: View, forecast: CapacityForecast, lacking: int) -> list[Proposal]:
    """Stop draining, or else wake, a worker that runs a model of a request on `lacking`.

    Nothing if such a worker is already waking, or active and empty.
    """
    workers = view.workers
    helps = workers.runs[view.requests.model[forecast.rows_on(lacking)]].any(axis=0)
    empty = view.active() & (workers.num_requests == 0)
    if (helps & (empty | (workers.state == WorkerState.WAKING))).any():
        return []
    for state in (WorkerState.DRAINING, WorkerState.PARKED):
        if (idle := helps & (workers.state == state)).any():
            return [WakeWorker(int(np.argmax(idle)))]
    return []


def _will_lack(view: View, forecast: CapacityForecast, workers: list[int]) -> list[int]:
    """The first of these workers without a destination once those before it have moved a request.

    The first one at once where waking takes less than a round: then one empty worker is kept
    ready, since arrivals may take the destination meanwhile.
    """
    if view.cost.wake_s <= view.period_s:
        return workers[:1]
    for worker in workers:
        if (rows := forecast.movable_rows(view, worker)) is not None:
            if (move := _best(view, forecast, worker, rows, min_overflow_s(view))) is None:
                return [worker]
            _record(view, forecast, worker, *move)
    return []


def _best(
    view: View,
    forecast: CapacityForecast,
    worker: int,
    rows: np.ndarray,
    keep_s: float,
    may: np.ndarray | None = None,
) -> tuple[int, int] | None:
    """(row, destination) of the move that costs least; `keep_s` as in the kernel.

    may  bool [workers + 1]: possible destinations, overwritten; default: the busy ones
    """
    may = forecast.busy_destinations(view) if may is None else may
    may[worker] = False
    i, dst = best_relief(
        *request_columns(view, rows),
        view.workers.runs,
        forecast.free,
        forecast.growth,
        forecast.end_rate,
        may,
        worker,
        forecast.request_end_rate,
        move_price(view, worker),
        keep_s,
        cost_params(view),
    )
    return (int(rows[i]), int(dst)) if dst else None


def _to_empty_worker(
    view: View, forecast: CapacityForecast, worker: int, rows: np.ndarray
) -> tuple[int, int] | None:
    """(row, destination) of the move to an empty worker that costs least."""
    empty = forecast.accepts & (view.workers.num_requests == 0) & (forecast.slots > 0)
    return _best(view, forecast, worker, rows, 0.0, empty) if empty.any() else None


def _record(view: View, forecast: CapacityForecast, src: int, row: int, dst: int) -> MoveProposal:
    """The proposal, applied to the forecast; `src` receives nothing more in this round."""
    size, growth, _ = request_columns(view, np.array([row]))
    forecast.record_move(size[0], growth[0], src, dst)
    forecast.accepts[src] = False
    return MoveProposal(int(view.requests.request_id[row]), dst, "overflow")
