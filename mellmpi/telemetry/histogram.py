"""Histograms with fixed buckets, as Prometheus reads them, in constant memory."""

import numpy as np

FOLD_EVERY = 512  # values


def one_two_five(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 … up to `most`."""
    steps = (m * 10**e for e in range(len(str(most))) for m in (1, 2, 5))
    return tuple(float(step) for step in steps if step <= most)


# The buckets of vLLM's metrics of the same names.
TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
LATENCY_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = one_two_five(200_000)
# Of migrations: downtimes are tens of milliseconds, and KV is of kilobytes to gigabytes.
MOVE_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 10.0, 30.0),
)
MOVE_BYTES = tuple(float(4**e) for e in range(5, 18))  # 1 KiB … 16 GiB


class Histogram:
    """Counts values by bucket: bucket i holds those above bound i - 1 and at most bound i."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._sum, self._counts = 0.0, np.zeros(len(bounds) + 1, np.int64)
        self._new: list[float] = []  # not yet counted

    def add(self, value: float) -> None:
        self._new.append(value)
        if len(self._new) >= FOLD_EVERY:
            self._fold()

    def _fold(self) -> None:
        buckets = np.searchsorted(self.bounds, self._new)
        self._counts += np.bincount(buckets, minlength=len(self._counts))
        self._sum += sum(self._new)
        self._new.clear()

    def read(self) -> tuple[list[int], float]:
        """Number of values at most each bound, and of all; the sum of the values."""
        if self._new:
            self._fold()
        return self._counts.cumsum().tolist(), self._sum
