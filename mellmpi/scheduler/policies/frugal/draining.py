"""Draining: empty the workers that hold least, if that lowers the sum of placement costs."""

import numpy as np

from mellmpi.scheduler.ledger import WorkerState
from mellmpi.scheduler.policies.frugal.forecast import (
    CapacityForecast,
    cost_params,
    min_overflow_s,
    move_price,
    request_columns,
    time_scale,
)
from mellmpi.scheduler.policies.kernels import best_relief, empty_worker
from mellmpi.scheduler.view import Drain, MoveProposal, Proposal, View

CLUSTER_OVERFLOW_S = 1.5  # least time to overflow, over all busy workers together, after a drain
WAKES = 2  # wakes whose time is kept in addition, by the cluster and by each destination
EXTRA_WORKERS = 1.0  # workers' capacity to be free besides, for each failed attempt to empty one
MAX_FAILURES = 4  # consecutive failed attempts


def continue_draining(view: View, forecast: CapacityForecast) -> list[Proposal]:
    """Moves of requests that are still on draining workers, where others have room."""
    proposals: list[Proposal] = []
    for worker in view.workers.workers(WorkerState.DRAINING):
        if forecast.is_source[worker]:
            continue
        rows = forecast.rows_on(worker)
        for row in rows[view.requests.movable[rows]].tolist():
            size, growth, model = request_columns(view, np.array([row]))
            _, dst = best_relief(
                size,
                growth,
                model,
                view.workers.runs,
                forecast.free,
                forecast.growth,
                forecast.end_rate,
                forecast.busy_destinations(view),
                worker,
                forecast.request_end_rate,
                0.0,
                min_overflow_s(view),
                cost_params(view),
            )
            if dst:
                forecast.record_move(size[0], growth[0], worker, dst)
                proposals.append(
                    MoveProposal(int(view.requests.request_id[row]), int(dst), "drain")
                )
    return proposals


def drain(view: View, forecast: CapacityForecast) -> list[Proposal]:
    """Drain proposals, each with moves of all requests of its worker.

    Several workers in a round: with short answers many workers become almost empty at once.
    """
    workers = view.workers
    draining = workers.state == WorkerState.DRAINING
    if view.waiting_bytes or (draining & (workers.num_requests > 0)).any():
        return []
    busy = view.active() & (workers.num_requests > 0)
    forecast.accepts &= busy
    held = np.where(busy, 1 - workers.budget / np.maximum(workers.capacity, 1), np.inf)
    keep_s = time_scale(view) * CLUSTER_OVERFLOW_S + WAKES * view.cost.wake_s
    spare, keep = forecast.free[busy].sum(), keep_s * forecast.growth[busy].sum()
    proposals: list[Proposal] = []
    failures = 0
    for victim in np.argsort(held, kind="stable")[: int(busy.sum())].tolist():
        needed = 1 + failures * EXTRA_WORKERS * time_scale(view)
        if failures == MAX_FAILURES or spare - needed * workers.capacity[victim] < keep:
            break
        moves = _empty(view, forecast, victim)
        failures = 0 if moves else failures + 1
        if moves:
            spare -= workers.capacity[victim]
            proposals += [Drain(victim), *moves]
    return proposals


def _empty(view: View, forecast: CapacityForecast, victim: int) -> list[Proposal]:
    """Moves of all requests away from a worker; none if that is impossible or costs more.

    Neither a source nor a destination of this round's moves is emptied.
    """
    slots = view.workers.max_requests[victim] - view.workers.num_requests[victim]
    if forecast.is_source[victim] or forecast.slots[victim] != slots:
        return []
    if (rows := forecast.movable_rows(view, victim)) is None:
        return []
    size, growth, model = request_columns(view, rows)
    order = np.argsort(-size, kind="stable")
    dst = np.zeros(len(rows), np.int64)
    forecast.accepts[victim] = False
    if not empty_worker(
        size[order],
        growth[order],
        model[order],
        view.workers.runs,
        forecast.free,
        forecast.growth,
        forecast.end_rate,
        forecast.slots,
        forecast.accepts,
        victim,
        forecast.request_end_rate,
        move_price(view, victim),
        min_overflow_s(view) + WAKES * view.cost.wake_s,
        cost_params(view),
        dst,
    ):
        forecast.accepts[victim] = True
        return []
    ids = view.requests.request_id[rows[order]]
    return [MoveProposal(int(r), int(w), "drain") for r, w in zip(ids, dst, strict=True)]
