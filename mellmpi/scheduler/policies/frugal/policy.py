"""Frugal: as few workers as hold the load, with room for it to grow.

The *placement cost* of a worker has two terms: its overflow to come, and its idle memory. With T
the time to overflow (free bytes / growth) and λ the requests a second expected to end on it,

    cost = 2.0 · exp(-T · (1 / 5.5 s + 2.0 · λ)) + 1 - exp(-T / 8.5 s)

An overflow counts less the later it is, and the likelier a request ends before. The constants are
those of `frugal.forecast`, the kernels approximate exp by `kernels.decay`. Every decision minimises
the sum of the costs:

- An arrival goes to the worker whose cost it raises least.
- A worker about to overflow gives away one request: the pair of request and destination that costs
  least, with a price for the bytes moved.
- Workers are emptied, those that hold least first, if that lowers the sum.

`View.thrift` scales all times: lower times mean fewer workers and more moves. The constants were
chosen on seven public traces together; docs/policies.md shows the frontier.
"""

import numpy as np

from mellmpi.scheduler.policies.base import free_after, park_empty
from mellmpi.scheduler.policies.frugal.draining import continue_draining, drain
from mellmpi.scheduler.policies.frugal.forecast import (
    CapacityForecast,
    cost_params,
    min_overflow_s,
    request_end_rate,
)
from mellmpi.scheduler.policies.frugal.relief import activate_worker, relieve
from mellmpi.scheduler.policies.kernels import best_placement
from mellmpi.scheduler.view import Proposal, View


def place(view: View, row: int, model: str) -> int | None:
    """The busy worker whose cost the request raises least, else an empty one, else None.

    The worker keeps enough time to wake another one. While no other can be woken it also keeps half
    an answer free for each of its requests: the queue waits rather than cause preemptions.
    """
    workers, requests, rate = view.workers, view.requests, view.token_rate
    keep_s = min_overflow_s(view) + view.cost.wake_s
    worker = best_placement(
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
        request_end_rate(view),
        rate,
        view.answer_tokens / 2,
        keep_s,
        cost_params(view),
    )
    return int(worker) or _place_on_empty(view, row, model)


def rebalance(view: View) -> list[Proposal]:
    """Avert overflows, then empty workers; park empty ones if there is nothing to move."""
    forecast = CapacityForecast.of(view)
    proposals, lacking = relieve(view, forecast)
    proposals += dict.fromkeys(
        proposal for worker in lacking for proposal in activate_worker(view, forecast, worker)
    )
    proposals += continue_draining(view, forecast) or drain(view, forecast)
    return proposals if proposals or lacking else park_empty(view)


def _place_on_empty(view: View, row: int, model: str) -> int | None:
    """The empty worker with the most memory, if the request fits; it needs no room to grow."""
    free = np.where(view.workers.num_requests == 0, free_after(view, row, model), -1)
    worker = int(np.argmax(free))
    return worker if free[worker] >= 0 else None
