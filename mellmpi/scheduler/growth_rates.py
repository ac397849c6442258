"""Decode rate of requests and KV growth of workers, from step reports."""

import numpy as np

from mellmpi.scheduler.view import View

LONGEST_PERIOD_S = 1.0  # most time between two ticks; a longer one was an idle pause
RATE_BLEND = 0.3  # weight of the newest interval in a rate


class GrowthRates:
    """Exponential moving averages, written to `growth_Bps` and `token_rate` of the view."""

    def __init__(self, view: View):
        self._view = view
        self.decoded = np.zeros(len(view.growth_Bps))  # tokens by worker, since the last tick
        self._ticked_s = 0.0

    def tick(self, now: float) -> None:
        """Blend in the tokens decoded since the last tick."""
        view = self._view
        elapsed, self._ticked_s = now - self._ticked_s, now
        rates = self.decoded / max(elapsed, 1e-9)
        view.period_s = min(elapsed, LONGEST_PERIOD_S)
        view.growth_Bps += RATE_BLEND * (rates * self._token_bytes() - view.growth_Bps)
        if running := int(view.workers.num_requests.sum()):
            per_request = float(rates.sum()) / running
            view.token_rate += RATE_BLEND * (per_request - view.token_rate)
        self.decoded[:] = 0

    def _token_bytes(self) -> np.ndarray:
        """float64 [workers + 1]: bytes of KV of one position, the mean over a worker's requests.

        All sequences of a worker decode one token a step, so the mean is the growth per token.
        """
        requests, num_workers = self._view.requests, len(self._view.growth_Bps)
        rows = np.flatnonzero(requests.live & (requests.worker > 0))
        workers = requests.worker[rows]
        total = np.bincount(workers, requests.token_bytes[rows], minlength=num_workers)
        number = np.bincount(workers, minlength=num_workers)
        # A worker whose requests have all finished: the largest of its models.
        return np.where(number > 0, total / np.maximum(number, 1), self._view.workers.token_bytes)
