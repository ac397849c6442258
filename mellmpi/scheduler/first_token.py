"""Predicts when a new request would get its first token.

    ttft_s = (KV bytes before it and its own) / (KV bytes a second that become free)
             + factor · (prefill behind the prompts of its worker)

The first term, the wait for memory, is 0 if no request goes before and a worker has room; the
policy, which may keep that room free, is not asked. Otherwise each request that finishes makes room
for one, and what it frees beyond that is what others grow by. While those that run are younger than
the mean, their growth to come goes before the queue, too. Requests finish at their token rate over
their mean length; the tokens of those still running count, since the mean of finished ones alone is
too short while load rises. Waking workers, and parked ones that can be woken, shorten the wait. All
of this is measured anew at every moment.

The factor is the median of actual over predicted prefill times of the requests whose first token
came last. There is none for the wait: it would correct today's rate by the error of a forecast as
old as the wait is long, and then swing.

In simulations of four times the load with a limit of 10 s (`tests/sim/test_first_token.py`, other
seeds), the median of actual over predicted times of accepted requests was 0.8 to 1.3, the 90th
percentile 1.3 to 1.8, and their TTFT's 99th percentile 11 to 19 s.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from mellmpi.protocol import Rejected, Request, kv_need
from mellmpi.scheduler.ledger import ACTIVE, WorkerState
from mellmpi.scheduler.queue import WaitingQueue
from mellmpi.scheduler.requests import Forecast, Record
from mellmpi.scheduler.workers import WorkerRegistry

RECENT, RECENT_S = 31, 60.0  # ratios of the last requests, none older than this, in seconds
OUTLIER = 8.0  # ratios are clipped to this factor around 1
SIZE_BLEND = 0.05  # weight of the newest request in the mean size at placement


@dataclass(slots=True)
class Correction:
    """The median of recent ratios of actual to predicted times."""

    _ratios: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    _median: float | None = 1.0  # None: to be computed

    def add(self, now: float, predicted_s: float, actual_s: float) -> None:
        if predicted_s > 0:
            ratio = min(max(actual_s / predicted_s, 1 / OUTLIER), OUTLIER)
            self._ratios.append((now, ratio))
            self._median = None

    def factor(self, now: float) -> float:
        """The median; 1 if there is no recent ratio: a wrong one must not refuse forever."""
        while self._ratios and self._ratios[0][0] < now - RECENT_S:
            self._ratios.popleft()
            self._median = None
        if self._median is None:
            self._median = median(ratio for _, ratio in self._ratios) if self._ratios else 1.0
        return self._median


class FirstTokens:
    """Forecasts of new requests, from queue, ledger, step times, wakes and release of KV."""

    def __init__(self, registry: WorkerRegistry, queue: WaitingQueue):
        self._registry, self._queue = registry, queue
        self._prefill = Correction()
        self._placed_bytes = 0.0  # mean KV of requests when they are placed; 0: none so far

    def ttft_s(self, forecast: Forecast, now: float) -> float:
        """Seconds from Submit to first token, corrected by what recent forecasts missed."""
        return forecast.wait_s + self._prefill.factor(now) * forecast.prefill_s

    def forecast(self, model: str, num_prompt: int, priority: int, now: float) -> Forecast:
        """The uncorrected forecast of a request that comes now. KeyError for an unknown model."""
        need = kv_need(self._registry.models[model], num_prompt)
        wait_s = self._wait_s(model, need, priority, now)
        return Forecast(wait_s, self._prefill_s(model, num_prompt))

    def refusal(
        self, request: Request, forecast: Forecast, limit_s: float | None, now: float
    ) -> Rejected | None:
        """Why its first token would come too late; None: in time. `limit_s` None: no limit."""
        if limit_s is None or (ttft_s := self.ttft_s(forecast, now)) <= limit_s:
            return None
        num_prompt, limit = len(request.prompt), f"the limit is {limit_s:g} s (--max-ttft-s)"
        if (alone_s := self.alone_s(num_prompt, now)) > limit_s:
            why = f"computing its prompt of {num_prompt} tokens takes {alone_s:.1f} s; {limit}"
            return Rejected(request.id, why, 0.0)
        why = f"its first token is expected in {ttft_s:.1f} s; {limit}"
        return Rejected(request.id, why, ttft_s - limit_s)

    def alone_s(self, num_prompt: int, now: float) -> float:
        """Seconds to the first token on a worker without any other request."""
        worker = int(np.argmax(self._registry.ledger.state == ACTIVE))
        alone_s = self._registry.estimates.prefill_s(worker, num_prompt, 0, 0)
        return self._prefill.factor(now) * alone_s

    # --- what was forecast, and what happened ---------------------------------------------------

    def placed(self, record: Record, num_bytes: int) -> None:
        """Learn from the first placement of a request."""
        now = self._registry.view.now
        self._placed_bytes += (SIZE_BLEND if self._placed_bytes else 1.0) * (
            num_bytes - self._placed_bytes
        )
        record.placed_s = now

    def first_token(self, record: Record) -> None:
        """Learn from the first token of a request that was never interrupted before."""
        now = self._registry.view.now
        if record.forecast is not None and record.placed_s is not None:
            self._prefill.add(now, record.forecast.prefill_s, now - record.placed_s)
        record.forecast = None

    # --- parts of a forecast --------------------------------------------------------------------

    def _wait_s(self, model: str, need: int, priority: int, now: float) -> float:
        """Seconds until a worker has room for the request and for those that go before it."""
        ledger = self._registry.ledger
        before = self._queue.bytes_before(model, priority)
        if not before:
            slots = ledger.num_requests < ledger.max_requests
            if (ledger.hosting(model) & slots & (ledger.budget >= need)).any():
                return 0.0
        able = ledger.able(model) & ~ledger.held
        active = able & (ledger.state == ACTIVE)
        ends, grown = self._ends_and_growth(model, active)
        freed_Bps = ends * (self._placed_bytes or need)
        lacking = before + need + max(0.0, grown - int(ledger.budget[active].sum()))
        release_s = lacking / freed_Bps if freed_Bps > 0 else math.inf
        awake_s, coming = self._next_awake(able, now)
        if before + need <= coming:
            return min(release_s, awake_s)
        rest_s = (lacking - coming) / freed_Bps if freed_Bps > 0 else 0.0
        return min(release_s, awake_s + rest_s)

    def _ends_and_growth(self, model: str, active: np.ndarray) -> tuple[float, float]:
        """Expected (requests a second that finish, bytes that running ones still grow by).

        active  bool [workers + 1]: the workers
        """
        view, kv = self._registry.view, self._registry.models[model]
        requests = view.requests
        number = int(view.workers.num_requests[active].sum())
        if not number:
            return 0.0, 0.0
        rate = view.token_rate  # of one request
        if rate <= 0:
            rate = 1 / max(view.cost.forward_s(0, number // int(active.sum())), 1e-9)
        running = int((requests.num_tokens - requests.num_prompt)[requests.live].sum())
        mean_output = self._mean_output(running)
        to_grow = max(0.0, number * mean_output - running)
        return number * rate / mean_output, to_grow * kv.block_bytes / kv.block_size

    def _mean_output(self, running: int) -> float:
        """Expected tokens of an answer, at least 1: of a constant rate of ends, the likeliest."""
        view, num_ended = self._registry.view, len(self._registry.view.lengths)
        ended = num_ended * view.lengths.mean_output(0.0)
        return max(1.0, (view.answer_tokens + ended + running) / (1 + num_ended))

    def _next_awake(self, able: np.ndarray, now: float) -> tuple[float, int]:
        """(seconds until a worker is awake, bytes of all that are waking or can be woken)."""
        ledger, wake_s = self._registry.ledger, self._registry.view.cost.wake_s
        waking = able & (ledger.state == WorkerState.WAKING)
        coming = waking | (able & (ledger.state == WorkerState.PARKED))
        if waking.any():
            since_s = float(self._registry.changed_s[waking].min())
            wake_s = max(0.0, wake_s - (now - since_s))
        return wake_s, int(ledger.capacity[coming].sum())

    def _prefill_s(self, model: str, num_prompt: int) -> float:
        """Seconds from the placement to the first token, on the mean of the busy workers."""
        registry, ledger = self._registry, self._registry.ledger
        busy = ledger.able(model) & (ledger.num_requests > 0)
        if not (number := int(busy.sum())):
            worker = int(np.argmax(ledger.hosting(model)))
            return registry.estimates.prefill_s(worker, num_prompt, 0, 0)
        worker = int(np.argmax(busy))
        queued = registry.prompts.total // number
        decoding = int(ledger.num_requests[busy].sum()) // number
        prefill_s = registry.estimates.prefill_s(worker, num_prompt, queued, decoding)
        return prefill_s + registry.estimates.steps.pace_s(worker) / 2  # the current step
