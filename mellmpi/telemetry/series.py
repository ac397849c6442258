"""Statistics and time series of a run, in bounded memory."""

import math
from array import array
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

INACTIVE = frozenset({"parked", "lost"})  # worker states that hold no device
EXACT_SAMPLES = 16_384  # kept by a distribution before it counts them in bins
STEPS = 2_048  # of one worker's series
LIST_SAMPLES = 20_000  # migrations, preemptions
FOLD_EVERY = 256  # samples

_SMALLEST_S, _BIN, _NUM_BINS = 1e-6, math.log(1.01), 2_560  # 1 µs … 32 h, bins 1 % apart

T = TypeVar("T")


class Distribution:
    """Samples in seconds; percentiles are exact up to EXACT_SAMPLES samples, then within 1 %."""

    def __init__(self) -> None:
        self._exact: list[float] = []
        self._bins = np.zeros(_NUM_BINS, np.int64)

    def add(self, value_s: float) -> None:
        self._exact.append(value_s)
        if len(self._exact) >= EXACT_SAMPLES:
            self._bins = self._folded()
            self._exact.clear()

    def percentiles_ms(self) -> dict[str, float | None]:
        """{"p50", "p99"} in milliseconds; None without samples."""
        return {f"p{q}": self._percentile_ms(q) for q in (50, 99)}

    def _folded(self) -> np.ndarray:
        logs = np.log(np.maximum(self._exact, _SMALLEST_S) / _SMALLEST_S)
        bins = np.minimum((logs / _BIN).astype(np.int64), _NUM_BINS - 1)
        return self._bins + np.bincount(bins, minlength=_NUM_BINS)

    def _percentile_ms(self, q: float) -> float | None:
        if not self._bins.any():
            return round(float(np.percentile(self._exact, q)) * 1e3, 3) if self._exact else None
        counts = self._folded().cumsum()
        index = int(np.searchsorted(counts, q / 100 * counts[-1]))
        return round(_SMALLEST_S * math.exp((index + 0.5) * _BIN) * 1e3, 3)


class StepFunction(Generic[T]):
    """A step function of time; above `limit` steps, those that follow closely are merged."""

    def __init__(self, limit: int = STEPS) -> None:
        self.times, self.values = array("d"), list[T]()
        self._limit, self._gap_s = limit, 0.0

    def add(self, now: float, value: T) -> None:
        if self.times and now - self.times[-1] <= self._gap_s:
            self.values[-1] = value
            return
        self.times.append(now)
        self.values.append(value)
        if len(self.times) > self._limit:
            self._thin()

    def _thin(self) -> None:
        times, values = self.times, self.values
        self._gap_s = 2 * (times[-1] - times[0]) / self._limit
        self.times, self.values = array("d"), []
        for now, value in zip(times, values, strict=True):
            self.add(now, value)


class Sample(Generic[T]):
    """All items, or above `limit` every second, fourth … item."""

    def __init__(self, limit: int = LIST_SAMPLES) -> None:
        self.items: list[T] = []
        self._seen, self._stride, self._limit = 0, 1, limit

    def add(self, item: T) -> None:
        if self._seen % self._stride == 0:
            self.items.append(item)
        self._seen += 1
        if len(self.items) > self._limit:
            self.items = self.items[::2]
            self._stride *= 2


class NormalEquations:
    """The normal equations of a weighted least-squares fit of y by x, in constant memory."""

    def __init__(self, *names: str) -> None:
        self.names, self.count = names, 0
        self._xx, self._xy = np.zeros((len(names), len(names))), np.zeros(len(names))
        self._new: list[tuple[float, ...]] = []  # (*x, y, weight), not yet in the sums

    def add(self, x: tuple[float, ...], y: float, weight: float = 1.0) -> None:
        """Add a sample; `weight` is proportional to 1 / variance of y."""
        self._new.append((*x, y, weight))
        self.count += 1
        if len(self._new) >= FOLD_EVERY:
            self._fold()

    def _fold(self) -> None:
        rows, n = np.array(self._new, np.float64), len(self.names)
        weighted = rows[:, :n].T * rows[:, n + 1]
        self._xx += weighted @ rows[:, :n]
        self._xy += weighted @ rows[:, n]
        self._new.clear()

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `xx` is their matrix, `xy` their right side, `of` the names of x."""
        if self._new:
            self._fold()
        return {
            "of": list(self.names),
            "samples": self.count,
            "xx": self._xx.tolist(),
            "xy": self._xy.tolist(),
        }


@dataclass(frozen=True, slots=True)
class MoveRecord:
    """One migration as rank 0 observed it; `outcome` as in MigrationEnded."""

    request_id: int
    mode: str
    src: int
    dst: int
    start_s: float
    end_s: float
    num_bytes: int
    outcome: str


@dataclass(frozen=True, slots=True)
class WorkerSeries:
    """Step functions of one worker: value i holds from time i to time i + 1."""

    capacity_bytes: int
    kv_times_s: list[float]
    kv_bytes: list[int]
    state_times_s: list[float]
    states: list[str]


@dataclass(frozen=True, slots=True)
class Series:
    """Data of a timeline. Times in seconds after the first Submit; they may be negative."""

    end_s: float
    workers: dict[int, WorkerSeries]
    moves: list[MoveRecord]
    preemptions: list[tuple[float, int]]  # (time, worker)
    report: dict[str, Any]
