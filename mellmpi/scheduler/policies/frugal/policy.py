"""Frugal: as few workers as hold the load, with room for it to grow.

Every worker is under a strain: of the overflow to come, which counts the less the more time is
left and the likelier somebody leaves before; and of room that lies idle. Each decision is the one
that leaves least of it.

- An arrival goes to the worker whose strain it raises least.
- A worker about to overflow gives away the request, to the place, that leave least strain; bytes
  have a price.
- A worker is emptied, those that hold least first, if that lowers the sum of strains.

`View.thrift` scales how much time is kept: less time, fewer workers, more moves. The constants
serve all public traces at once; docs/policies.md has the frontier.
"""

import numpy as np

from mellmpi.scheduler.policies.base import idle_workers, room_after
from mellmpi.scheduler.policies.frugal.draining import drain, go_on_draining
from mellmpi.scheduler.policies.frugal.forecast import (
    CapacityForecast,
    least_s,
    leaves,
    strain_of,
)
from mellmpi.scheduler.policies.frugal.relief import one_worker_more, relieve
from mellmpi.scheduler.policies.kernels import place_on
from mellmpi.scheduler.view import Proposal, View


def place(view: View, row: int, model: str) -> int | None:
    """The worker whose strain it raises least, with room to grow, while others can be woken.

    Where every worker is active already, what overflows can only be preempted: then the queue
    waits, rather than fill the last room of those that run.
    """
    workers, requests, rate = view.workers, view.requests, view.token_rate
    keep_s = least_s(view) + view.cost.wake_s  # or no other could be woken in time
    worker = place_on(
        workers.free,
        workers.ordered,
        workers.num_requests,
        workers.max_requests,
        workers.token_bytes,
        workers.block_bytes,
        workers.state,
        workers.able(model),
        view.growth_Bps,
        view.hosting(model),
        requests.need(row),
        rate * float(requests.token_bytes[row]),
        leaves(view),
        rate,
        view.answer_tokens / 2,
        keep_s,
        strain_of(view),
    )
    return int(worker) or _empty_one(view, row, model)


def rebalance(view: View) -> list[Proposal]:
    """Avert overflow and empty what can be emptied; if there is neither, park the empty ones."""
    forecast = CapacityForecast.of(view)
    proposals, lacking = relieve(view, forecast)
    proposals += dict.fromkeys(
        w for worker in lacking for w in one_worker_more(view, forecast, worker)
    )
    proposals += go_on_draining(view, forecast) or drain(view, forecast)
    return proposals if proposals or lacking else idle_workers(view)


def _empty_one(view: View, row: int, model: str) -> int | None:
    """An empty worker with room for it: all the room there is."""
    room = np.where(view.workers.num_requests == 0, room_after(view, row, model), -1)
    worker = int(np.argmax(room))
    return worker if room[worker] >= 0 else None
