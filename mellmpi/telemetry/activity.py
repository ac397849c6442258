"""State and KV in use of every worker over time."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mellmpi.protocol import ModelKv, WorkerReady
from mellmpi.telemetry.series import INACTIVE, StepFunction, WorkerSeries


@dataclass(slots=True)
class _Worker:
    capacity_bytes: int = 0
    state: str = ""
    ready_at: float | None = None  # time of the first WorkerReady
    kv: StepFunction[int] = field(default_factory=StepFunction)
    states: StepFunction[str] = field(default_factory=StepFunction)


class Activity:
    """Call it for every report and every change of state, with a `now` that never decreases."""

    def __init__(self) -> None:
        self.entered: Counter[str] = Counter()  # state -> number of changes to it
        self.peak = 0  # most active workers at one time
        self._workers: dict[int, _Worker] = {}
        self._models: dict[str, ModelKv] = {}
        self._active = 0
        self._active_s, self._since = 0.0, 0.0

    def __len__(self) -> int:
        return len(self._workers)

    def begin(self, now: float) -> None:
        """Start to count device time and its peak."""
        self._active_s, self._since, self.peak = 0.0, now, self._active

    def state(self, worker: int) -> str:
        """The worker's state; empty before its first event."""
        return self._worker(worker).state

    def ready(self, now: float, worker: int, ready: WorkerReady) -> None:
        """The worker is active and its KV cache is empty."""
        w = self._worker(worker)
        w.capacity_bytes = ready.capacity_bytes
        w.ready_at = now if w.ready_at is None else w.ready_at
        self._models |= {kv.model: kv for kv in ready.models}
        self.enter(now, worker, "active")
        self.used(now, worker, ready.capacity_bytes)

    def used(self, now: float, worker: int, free_bytes: int) -> None:
        """Record that `free_bytes` of the worker's KV cache are free."""
        w = self._worker(worker)
        w.kv.add(now, max(0, w.capacity_bytes - free_bytes))

    def enter(self, now: float, worker: int, state: str) -> None:
        """Record a change of state; a lost worker stays lost."""
        w = self._worker(worker)
        if state == w.state or w.state == "lost":
            return
        was_active = w.state not in INACTIVE and w.state != ""
        w.state = state
        w.states.add(now, state)
        if state in INACTIVE:
            w.kv.add(now, 0)
        self.entered[state] += 1
        self._activate(now, (state not in INACTIVE) - was_active)

    def _worker(self, worker: int) -> _Worker:
        if (known := self._workers.get(worker)) is None:
            known = self._workers[worker] = _Worker()
        return known

    def _activate(self, now: float, change: int) -> None:
        self._active_s, self._since = self.active_s(now), now
        self._active += change
        self.peak = max(self.peak, self._active)

    def active_s(self, now: float) -> float:
        """Device seconds of all workers together since `begin`."""
        return self._active_s + self._active * (now - self._since)

    def ready_s(self, start_s: float) -> list[float]:
        """First WorkerReady of each worker, in seconds after `start_s`; negative if before."""
        by_worker = sorted(self._workers.items())
        return [w.ready_at - start_s for _, w in by_worker if w.ready_at is not None]

    @property
    def active(self) -> int:
        """Workers that hold their device."""
        return self._active

    def usage(self) -> dict[int, float]:
        """{worker: share of its KV cache in use}, of all workers that have been ready."""
        known = ((w, s.capacity_bytes, s.kv.values) for w, s in sorted(self._workers.items()))
        return {w: used[-1] / capacity for w, capacity, used in known if capacity and used}

    def kv(self) -> dict[str, Any]:
        """Bytes of the largest arena, and block sizes of each model."""
        capacity = max((w.capacity_bytes for w in self._workers.values()), default=0)
        models = {
            name: {"block_size": kv.block_size, "block_bytes": kv.block_bytes}
            for name, kv in self._models.items()
        }
        return {"capacity_bytes": capacity, "models": models}

    def series(self, start_s: float) -> dict[int, WorkerSeries]:
        """{worker: series}; times in seconds after `start_s`."""
        return {w: _series(self._workers[w], start_s) for w in sorted(self._workers)}


def _series(worker: _Worker, start_s: float) -> WorkerSeries:
    return WorkerSeries(
        capacity_bytes=worker.capacity_bytes,
        kv_times_s=[t - start_s for t in worker.kv.times],
        kv_bytes=list(worker.kv.values),
        state_times_s=[t - start_s for t in worker.states.times],
        states=list(worker.states.values),
    )
