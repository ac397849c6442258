"""Workers, emptied: those that hold least, as long as the others are better off for it."""

import numpy as np

from mellmpi.scheduler.ledger import WorkerState
from mellmpi.scheduler.policies.frugal.forecast import (
    CapacityForecast,
    least_s,
    price,
    scale,
    sizes,
    strain_of,
)
from mellmpi.scheduler.policies.kernels import emptied, relief
from mellmpi.scheduler.view import Drain, MoveProposal, Proposal, View

FLEET_S = 1.5  # no worker is emptied unless the others keep so much time to overflow, together
WAKES = 2  # both there and on each of them, time for so many wakes is kept besides
FURTHER = 1.0  # with so many workers' room more, one more is looked at where one cannot be emptied
LOOKS = 4  # but no more than these


def go_on_draining(view: View, forecast: CapacityForecast) -> list[Proposal]:
    """What is still on a draining worker, as far as it fits elsewhere."""
    proposals: list[Proposal] = []
    for worker in view.workers.workers(WorkerState.DRAINING):
        if forecast.gave[worker]:
            continue  # an overflow was averted there: one move at a time
        rows = forecast.on(worker)
        rows = rows[view.requests.movable[rows]]
        for row in rows.tolist():
            size, grow, model = sizes(view, np.array([row]))
            _, dst = relief(
                size,
                grow,
                model,
                view.workers.runs,
                forecast.room,
                forecast.growth,
                forecast.leaving,
                forecast.accepting(view),
                worker,
                forecast.leaves,
                0.0,
                least_s(view),
                strain_of(view),
            )
            if dst:
                forecast.give(size[0], grow[0], worker, dst)
                proposals.append(
                    MoveProposal(int(view.requests.request_id[row]), int(dst), "drain")
                )
    return proposals


def drain(view: View, forecast: CapacityForecast) -> list[Proposal]:
    """Empty the workers that hold least, one after the other, as long as that lowers the strain.

    Short answers leave many workers almost empty within a moment: one a round would lag behind.
    """
    workers = view.workers
    draining = workers.state == WorkerState.DRAINING
    if view.waiting_bytes or (draining & (workers.num_requests > 0)).any():
        return []
    busy = view.active() & (workers.num_requests > 0)
    forecast.takes &= busy  # to move into an empty worker would gain nothing
    held = np.where(busy, 1 - workers.budget / np.maximum(workers.capacity, 1), np.inf)
    keep_s = scale(view) * FLEET_S + WAKES * view.cost.wake_s
    spare, keep = forecast.room[busy].sum(), keep_s * forecast.growth[busy].sum()
    proposals: list[Proposal] = []
    failed = 0
    for victim in np.argsort(held, kind="stable")[: int(busy.sum())].tolist():
        further = 1 + failed * FURTHER * scale(view)
        if failed == LOOKS or spare - further * workers.capacity[victim] < keep:
            break
        took = forecast.seats[victim] != workers.max_requests[victim] - workers.num_requests[victim]
        rows = None if forecast.gave[victim] or took else forecast.settled(view, victim)
        moves = [] if rows is None else _empty(view, forecast, victim, rows)
        failed = 0 if moves else failed + 1
        if moves:
            spare -= workers.capacity[victim]
            proposals += [Drain(victim), *moves]
    return proposals


def _empty(view: View, forecast: CapacityForecast, victim: int, rows: np.ndarray) -> list[Proposal]:
    """All moves away from this worker, or none."""
    size, grow, model = sizes(view, rows)
    order = np.argsort(-size, kind="stable")
    dst = np.zeros(len(rows), np.int64)
    keep_s = least_s(view) + WAKES * view.cost.wake_s
    forecast.takes[victim] = False
    if not emptied(
        size[order],
        grow[order],
        model[order],
        view.workers.runs,
        forecast.room,
        forecast.growth,
        forecast.leaving,
        forecast.seats,
        forecast.takes,
        victim,
        forecast.leaves,
        price(view, victim),
        keep_s,
        strain_of(view),
        dst,
    ):
        forecast.takes[victim] = True
        return []
    ids = view.requests.request_id[rows[order]]
    return [MoveProposal(int(r), int(w), "drain") for r, w in zip(ids, dst, strict=True)]
