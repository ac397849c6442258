"""What a run did, from (time, event) pairs: runtime, simulator and benches share these definitions.

TTFT      Submit → the first Emit that carries tokens.
TPOT      (last − first token time) / (n − 1) of a completed request with n ≥ 2 tokens.
ITL       gap between two Emits of one request; tokens that arrive together count as one.
E2E       Submit → the last token of a completed request.
downtime  last token that the source of a migration reported itself → first token that the
          destination computed, both when rank 0 sees them. Tokens that the source made and
          `KvReceived` brought do not end it, so it never flatters: it includes one decode step.
          Workers report at once what a move has stopped, and the first token of what has come.
          Moves before the first token have none.
active    a worker that is neither parked nor lost: it holds its device, also while it starts,
          drains, parks or wakes.
wall      first Submit → the `now` of the report. Device time before it is not counted.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mellmpi import protocol as p
from mellmpi.series import INACTIVE, Distribution, Move, Sample, Series, Sums, Track, WorkerSeries


@dataclass(slots=True)
class _Live:
    """One request between Submit and its end."""

    submit_s: float
    num_prompt: int
    num_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    reported_s: float | None = None  # last token in a StepReport
    src: int | None = None  # it is moving away from here
    landed_at: int | None = None  # it has moved here, and has had no token from here yet


@dataclass(slots=True)
class _Worker:
    capacity_bytes: int = 0
    state: str = ""
    kv: Track = field(default_factory=Track)
    states: Track = field(default_factory=Track)


class Metrics:
    """Hears everything rank 0 receives and sends; knows no clock.

    Call `observe` with an event, then `command` with each of its consequences, in this order and
    with a `now` that never falls: a token is credited to the worker whose report is being handled.
    Work is per run of tokens and per report, never per token.
    """

    def __init__(self) -> None:
        self._start_s: float | None = None
        self._live: dict[int, _Live] = {}
        self._workers: dict[int, _Worker] = {}
        self._moving: dict[int, tuple[float, p.MigrationStarted]] = {}
        self._moves, self._preempted = Sample(), Sample()
        self._errors = Sample()  # of predicted times of migrations, relative
        self._reporter: int | None = None  # worker whose StepReport is being handled
        self._counts: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._moved: Counter[str] = Counter()
        self._ttft, self._tpot, self._itl = Distribution(), Distribution(), Distribution()
        self._e2e, self._downtime = Distribution(), Distribution()
        self._steps = Sums("steps", "prefill_tokens", "decode_tokens")  # -> seconds
        self._transfers, self._wakes = Sums("transfers", "bytes"), Sums("wakes")  # -> seconds
        self._kv: dict[str, int] = {}  # what a worker is like
        self._ready_at: dict[int, float] = {}  # by worker, the first time
        self._active = self._peak = 0
        self._active_s, self._active_since = 0.0, 0.0

    # --- in ---

    def observe(self, now: float, source: p.Address, event: Any) -> None:
        """Rank 0 has received `event` from `source`, and is about to handle it."""
        self._reporter = None
        match event:
            case p.StepReport() if isinstance(source, int):
                self._reporter = source
                self._used(now, source, event.free_bytes)
                self._stepped(event)
            case p.Submit():
                self._submitted(now, event.request)
            case p.Cancel(request_id, "stop") if request_id in self._live:
                self._finished(request_id, self._live[request_id])
            case p.Cancel():
                self._counts["cancelled"] += self._forget(event.request_id) is not None
            case p.WorkerReady() if isinstance(source, int):
                self._ready(now, source, event)
                self._enter(now, source, "active")
                self._used(now, source, event.capacity_bytes)
            case p.Parked() if isinstance(source, int):
                self._enter(now, source, "parked")
            case p.WorkerLost():
                self._enter(now, event.worker, "lost")
                self._recovers_from(event.worker)

    def command(self, now: float, destination: p.Address, command: Any) -> None:
        """Rank 0 sends `command` to `destination` because of the event observed last."""
        match command:
            case p.Emit():
                self._emitted(now, command)
            case p.Rejected():
                self._rejected(command.request_id)
            case p.Park() if isinstance(destination, int):
                self._enter(now, destination, "parking")
            case p.Wake() if isinstance(destination, int):
                self._enter(now, destination, "waking")
            case p.WorkerChanged():
                self._enter(now, command.worker, command.state)
            case p.MigrationStarted():
                self._departed(now, command)
            case p.MigrationEnded():
                self._ended(now, command)
            case p.Preempted():
                self._counts["preemptions"] += 1
                self._preempted.add((now, command.worker))
                self._waits(command.request_id)

    # --- what things take ---

    def _stepped(self, report: p.StepReport) -> None:
        if report.steps:
            x = (report.steps, report.prefill_tokens, report.decode_tokens)
            self._steps.add(x, report.step_s, weight=1 / report.steps)

    def _ready(self, now: float, source: int, ready: p.WorkerReady) -> None:
        worker = self._worker(source)
        self._ready_at.setdefault(source, now)
        worker.capacity_bytes = ready.capacity_bytes
        if worker.state == "waking":  # a start may convert weights, too, and all start at once
            self._wakes.add((1,), ready.wake_s)
        kv = ready.models[0]
        self._kv = {"capacity_bytes": ready.capacity_bytes, "block_size": kv.block_size,
                    "block_bytes": kv.block_bytes}  # fmt: skip

    # --- requests ---

    def _submitted(self, now: float, request: p.Request) -> None:
        if self._start_s is None:
            self._start_s = self._active_since = now
            self._active_s, self._peak = 0.0, self._active
        self._live[request.id] = _Live(now, len(request.prompt))
        self._counts["requests"] += 1
        self._counts["prompt_tokens"] += len(request.prompt)

    def _forget(self, request_id: int) -> _Live | None:
        self._moving.pop(request_id, None)
        return self._live.pop(request_id, None)

    def _rejected(self, request_id: int) -> None:
        live = self._forget(request_id)
        if live is None:  # refused by the front itself, before any Submit
            self._counts["requests"] += 1
        else:
            self._counts["prompt_tokens"] -= live.num_prompt
        self._counts["failed"] += 1

    def _emitted(self, now: float, emit: p.Emit) -> None:
        live = self._live.get(emit.request_id)
        if live is None:
            return
        if emit.tokens:
            if live.num_tokens:
                self._itl.add(now - live.last_s)
            else:
                live.first_s = now
                self._ttft.add(now - live.submit_s)
            if self._reporter is not None:
                self._reported(now, live, self._reporter)
            live.last_s = now
            live.num_tokens += len(emit.tokens)
            self._counts["output_tokens"] += len(emit.tokens)
        if emit.finish_reason is not None:
            self._finished(emit.request_id, live)

    def _reported(self, now: float, live: _Live, worker: int) -> None:
        if live.landed_at is not None or (live.src is not None and worker != live.src):
            if live.reported_s is not None:
                self._downtime.add(now - live.reported_s)
            live.landed_at, live.src = None, None
        live.reported_s = now

    def _finished(self, request_id: int, live: _Live) -> None:
        self._counts["completed"] += 1
        self._e2e.add(live.last_s - live.submit_s)
        if live.num_tokens > 1:
            self._tpot.add((live.last_s - live.first_s) / (live.num_tokens - 1))
        del self._live[request_id]

    # --- migrations ---

    def _departed(self, now: float, started: p.MigrationStarted) -> None:
        self._moving[started.request_id] = (now, started)
        if live := self._live.get(started.request_id):
            live.src = started.src

    def _ended(self, now: float, e: p.MigrationEnded) -> None:
        self._outcomes[e.outcome] += 1
        start_s, started = self._moving.pop(e.request_id, (now, None))
        self._moves.add(
            Move(e.request_id, e.mode, e.src, e.dst, start_s, now, e.num_bytes, e.outcome)
        )
        live = self._live.get(e.request_id)
        if e.outcome != "moved":
            if live is not None:
                live.src = None
            return
        self._moved[e.mode] += 1
        if started is not None and now > start_s:
            self._errors.add(abs(started.predicted_s - (now - start_s)) / (now - start_s))
        self._counts["migrated_bytes"] += e.num_bytes
        if e.num_bytes:
            self._transfers.add((1, e.num_bytes), e.transfer_s)
        if live is not None and live.src is not None:  # None: its first token is here already
            live.landed_at = e.dst

    def _waits(self, request_id: int) -> None:
        if live := self._live.get(request_id):
            live.src, live.landed_at = None, None

    def _recovers_from(self, worker: int) -> None:
        for live in self._live.values():
            if live.landed_at == worker:  # what follows is a recovery, not a migration
                live.src, live.landed_at = None, None

    # --- workers ---

    def _worker(self, worker: int) -> _Worker:
        return self._workers.setdefault(worker, _Worker())

    def _used(self, now: float, worker: int, free_bytes: int) -> None:
        w = self._worker(worker)
        w.kv.add(now, max(0, w.capacity_bytes - free_bytes))

    def _enter(self, now: float, worker: int, state: str) -> None:
        w = self._worker(worker)
        if state == w.state or w.state == "lost":
            return
        was_active = w.state not in INACTIVE and w.state != ""
        w.state = state
        w.states.add(now, state)
        if state in INACTIVE:
            w.kv.add(now, 0)
        self._counts[state] += 1
        self._activate(now, (state not in INACTIVE) - was_active)

    def _activate(self, now: float, change: int) -> None:
        self._active_s += self._active * (now - self._active_since)
        self._active_since = now
        self._active += change
        self._peak = max(self._peak, self._active)

    # --- out ---

    def report(self, now: float) -> dict[str, Any]:
        """The run so far, as plain data for JSON. Percentiles are None without samples."""
        wall_s = 0.0 if self._start_s is None else now - self._start_s
        active_s = self._active_device_seconds(now)
        count = self._counts
        return {
            "requests": count["requests"],
            "completed": count["completed"],
            "failed": count["failed"],  # rejected: they could never be served
            "cancelled": count["cancelled"],
            "wall_s": wall_s,
            "prompt_tokens": count["prompt_tokens"],  # of all but rejected requests
            "output_tokens": count["output_tokens"],
            "output_throughput": count["output_tokens"] / wall_s if wall_s else 0.0,
            "gpu_seconds_active": active_s,
            "gpu_seconds_total": len(self._workers) * wall_s,
            "workers": len(self._workers),
            "active_workers_mean": active_s / wall_s if wall_s else 0.0,
            "active_workers_peak": self._peak,
            "migrations": self._migrations(),
            "migration_outcomes": dict(self._outcomes),
            "migrated_bytes": count["migrated_bytes"],
            "migration_prediction_error": self._prediction_error(),
            "downtime_ms": self._downtime.percentiles_ms(),
            "ttft_ms": self._ttft.percentiles_ms(),
            "tpot_ms": self._tpot.percentiles_ms(),
            "itl_ms": self._itl.percentiles_ms(),
            "e2e_ms": self._e2e.percentiles_ms(),
            "preemptions": count["preemptions"],
            "parks": count["parked"],
            "wakes": count["waking"],
            "workers_lost": count["lost"],
            "worker_kv": self._kv,
            "ready_s": self._ready_s(),  # of workers, after the first Submit or before it
            "costs": {  # sums for `CostModel.fitted`
                "steps": self._steps.to_dict(),
                "transfers": self._transfers.to_dict(),
                "wakes": self._wakes.to_dict(),
            },
        }

    def _ready_s(self) -> list[float]:
        start_s = self._start_s or 0.0
        return [at - start_s for _, at in sorted(self._ready_at.items())]

    def _active_device_seconds(self, now: float) -> float:
        if self._start_s is None:
            return 0.0
        return self._active_s + self._active * (now - self._active_since)

    def _prediction_error(self) -> float | None:
        """|predicted - actual| / actual of the time of a move that succeeded, in the median."""
        errors = self._errors.items
        return float(np.median(errors)) if errors else None

    def _migrations(self) -> dict[str, int]:
        failed = sum(self._outcomes.values()) - self._outcomes["moved"]
        return {mode: self._moved[mode] for mode in ("transfer", "recompute", "split")} | {
            "failed": failed  # every outcome but "moved"; `migration_outcomes` tells them apart
        }

    def series(self, now: float) -> Series:
        """The time series up to `now`, for the timeline."""
        start_s = self._start_s or 0.0
        return Series(
            end_s=now - start_s,
            workers={w: _worker_series(self._workers[w], start_s) for w in sorted(self._workers)},
            moves=[
                replace(m, start_s=m.start_s - start_s, end_s=m.end_s - start_s)
                for m in self._moves.items
            ],
            preemptions=[(t - start_s, worker) for t, worker in self._preempted.items],
            report=self.report(now),
        )


def _worker_series(worker: _Worker, start_s: float) -> WorkerSeries:
    return WorkerSeries(
        capacity_bytes=worker.capacity_bytes,
        kv_times_s=[t - start_s for t in worker.kv.times],
        kv_bytes=list(worker.kv.values),
        state_times_s=[t - start_s for t in worker.states.times],
        states=list(worker.states.values),
    )
