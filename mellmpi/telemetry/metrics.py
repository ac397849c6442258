"""Figures of a run from (time, event) pairs; runtime, simulator and benchmarks share them.

TTFT      Submit → the first Emit that carries tokens.
TPOT      (last − first token time) / (n − 1) of a completed request with n ≥ 2 tokens.
ITL       gap between two Emits of one request; tokens of one Emit count as one.
E2E       Submit → the last token of a completed request.
downtime  last token in a report of a migration's source → first token that the destination
          computed, both at the time when rank 0 receives them. Source tokens in `KvReceived` do
          not end it, so it includes one decode step. Workers report these tokens at once.
          Migrations before the first token have no downtime.
active    a worker that is neither parked nor lost: it holds its device, also while it starts,
          drains, parks or wakes.
wall      first Submit → the `now` of the report. Device time before it is not counted.

TTFT, TPOT, ITL and E2E are the terms of vLLM's serving benchmark.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from mellmpi import protocol as p
from mellmpi.telemetry.activity import Activity
from mellmpi.telemetry.predictions import Predictions
from mellmpi.telemetry.series import Distribution, MoveRecord, NormalEquations, Sample, Series


@dataclass(slots=True)
class _Live:
    """One request between Submit and its end."""

    submit_s: float
    num_prompt: int
    num_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    reported_s: float | None = None  # time of the last token in a StepReport
    src: int | None = None  # source of the migration under way
    migration: p.MigrationStarted | None = None  # the newest one
    moved_to: int | None = None  # destination of a migration, until its first token


class Metrics:
    """Observes every event that rank 0 receives and every command that it sends.

    Call `observe` with an event, then `command` with each command that follows from it, with a
    `now` that never decreases: tokens are credited to the worker whose report is being handled.
    The cost is per Emit and per report, not per token.
    """

    def __init__(self) -> None:
        self._start_s: float | None = None
        self._live: dict[int, _Live] = {}
        self._activity = Activity()
        self._migrating: dict[int, tuple[float, p.MigrationStarted]] = {}
        self._moves = Sample[MoveRecord]()
        self._preempted = Sample[tuple[float, int]]()  # (time, worker)
        self._predictions = Predictions()
        self._reporter: int | None = None  # worker whose StepReport is being handled
        self._counts: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._moved: Counter[str] = Counter()
        self._ttft, self._tpot, self._itl = Distribution(), Distribution(), Distribution()
        self._e2e, self._downtime = Distribution(), Distribution()
        # Fits of seconds by these counts:
        self._steps = NormalEquations("steps", "prefill_tokens", "decode_tokens")
        self._transfers = NormalEquations("transfers", "bytes")
        self._wakes = NormalEquations("wakes")
        self._output_tokens = 0

    # --- input ---

    def observe(self, now: float, source: p.Address, event: Any) -> None:
        """Rank 0 has received `event` from `source`, and is about to handle it."""
        self._reporter = None
        match event:
            case p.StepReport() if isinstance(source, int):
                self._reporter = source
                self._activity.used(now, source, event.free_bytes)
                self._stepped(event)
            case p.Submit():
                self._submitted(now, event.request)
            case p.Cancel(request_id, "stop") if request_id in self._live:
                self._finished(request_id, self._live[request_id])
            case p.Cancel():
                self._counts["cancelled"] += self._forget(event.request_id) is not None
            case p.WorkerReady() if isinstance(source, int):
                if self._activity.state(source) == "waking":
                    # A first start is no sample: it may convert weights, beside other starts.
                    self._wakes.add((1,), event.wake_s)
                self._activity.ready(now, source, event)
            case p.Parked() if isinstance(source, int):
                self._activity.enter(now, source, "parked")
            case p.WorkerLost():
                self._activity.enter(now, event.worker, "lost")
                self._lose_destination(event.worker)

    def commands(self, now: float, commands: list[tuple[p.Address, Any]]) -> None:
        """Call `command` with each of them."""
        for destination, command in commands:
            if isinstance(command, p.Emit):  # the most frequent by far
                self._emitted(now, command)
            else:
                self.command(now, destination, command)

    def command(self, now: float, destination: p.Address, command: Any) -> None:
        """Rank 0 sends `command` to `destination` in response to the event observed last."""
        match command:
            case p.Emit():
                self._emitted(now, command)
            case p.Rejected():
                self._rejected(command.request_id)
            case p.Park() if isinstance(destination, int):
                self._activity.enter(now, destination, "parking")
            case p.Wake() if isinstance(destination, int):
                self._activity.enter(now, destination, "waking")
            case p.WorkerChanged():
                self._activity.enter(now, command.worker, command.state)
            case p.MigrationStarted():
                self._migration_started(now, command)
            case p.MigrationEnded():
                self._migration_ended(now, command)
            case p.Preempted():
                self._counts["preemptions"] += 1
                self._preempted.add((now, command.worker))
                self._queued(command.request_id)

    # --- steps ---

    def _stepped(self, report: p.StepReport) -> None:
        if report.steps:
            x = (report.steps, report.prefill_tokens, report.decode_tokens)
            self._steps.add(x, report.step_s, weight=1 / report.steps)

    # --- requests ---

    def _submitted(self, now: float, request: p.Request) -> None:
        if self._start_s is None:
            self._start_s = now
            self._activity.begin(now)
        self._live[request.id] = _Live(now, len(request.prompt))
        self._counts["requests"] += 1
        self._counts["prompt_tokens"] += len(request.prompt)

    def _forget(self, request_id: int) -> _Live | None:
        self._migrating.pop(request_id, None)
        return self._live.pop(request_id, None)

    def _rejected(self, request_id: int) -> None:
        live = self._forget(request_id)
        if live is None:  # refused by the frontend before a Submit
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
                if live.src is not None or live.moved_to is not None:
                    self._computed(now, live, self._reporter)
                live.reported_s = now
            live.last_s = now
            live.num_tokens += len(emit.tokens)
            self._output_tokens += len(emit.tokens)
        if emit.finish_reason is not None:
            self._finished(emit.request_id, live)

    def _computed(self, now: float, live: _Live, worker: int) -> None:
        """Tokens of a migrating request from `worker`: end its downtime, unless from its source."""
        if live.moved_to is None and worker == live.src:
            return
        if live.reported_s is not None:
            downtime_s = now - live.reported_s
            self._downtime.add(downtime_s)
            if (started := live.migration) is not None:
                predicted_s = started.predicted_downtime_s
                self._predictions.add(started.mode, "downtime_s", predicted_s, downtime_s)
        live.moved_to, live.src = None, None

    def _finished(self, request_id: int, live: _Live) -> None:
        self._counts["completed"] += 1
        self._e2e.add(live.last_s - live.submit_s)
        if live.num_tokens > 1:
            self._tpot.add((live.last_s - live.first_s) / (live.num_tokens - 1))
        del self._live[request_id]

    # --- migrations ---

    def _migration_started(self, now: float, started: p.MigrationStarted) -> None:
        self._migrating[started.request_id] = (now, started)
        if live := self._live.get(started.request_id):
            live.src, live.migration = started.src, started

    def _migration_ended(self, now: float, e: p.MigrationEnded) -> None:
        self._outcomes[e.outcome] += 1
        start_s, started = self._migrating.pop(e.request_id, (now, None))
        self._moves.add(
            MoveRecord(e.request_id, e.mode, e.src, e.dst, start_s, now, e.num_bytes, e.outcome)
        )
        live = self._live.get(e.request_id)
        if e.outcome != "moved":
            if live is not None:
                live.src = None
            return
        self._moved[e.mode] += 1
        if started is not None:
            self._predictions.add(e.mode, "seconds", started.predicted_s, now - start_s)
            self._predictions.add(e.mode, "bytes", started.num_bytes, e.num_bytes)
        self._counts["migrated_bytes"] += e.num_bytes
        if e.num_bytes:
            self._transfers.add((1, e.num_bytes), e.transfer_s)
        if live is not None and live.src is not None:  # None: the first token came before
            live.moved_to = e.dst

    def _queued(self, request_id: int) -> None:
        """Preempted: the wait in the queue is no downtime."""
        if live := self._live.get(request_id):
            live.src, live.moved_to = None, None

    def _lose_destination(self, worker: int) -> None:
        for live in self._live.values():
            if live.moved_to == worker:  # the next token ends a recovery, not a migration
                live.src, live.moved_to = None, None

    # --- output ---

    def report(self, now: float) -> dict[str, Any]:
        """The run so far, as plain data for JSON. Percentiles are None without samples."""
        wall_s = 0.0 if self._start_s is None else now - self._start_s
        activity, count = self._activity, self._counts
        active_s = 0.0 if self._start_s is None else activity.active_s(now)
        return {
            "requests": count["requests"],
            "completed": count["completed"],
            "failed": count["failed"],  # rejected: they could never be served
            "cancelled": count["cancelled"],
            "wall_s": wall_s,
            "prompt_tokens": count["prompt_tokens"],  # of all but rejected requests
            "output_tokens": self._output_tokens,
            "output_throughput": self._output_tokens / wall_s if wall_s else 0.0,
            "gpu_seconds_active": active_s,
            "gpu_seconds_total": len(activity) * wall_s,
            "workers": len(activity),
            "active_workers_mean": active_s / wall_s if wall_s else 0.0,
            "active_workers_peak": activity.peak,
            "migrations": self._migrations(),
            "migration_outcomes": dict(self._outcomes),
            "migrated_bytes": count["migrated_bytes"],
            "migration_prediction_error": self._predictions.error("seconds"),
            "migration_predictions": self._predictions.to_dict(),
            "downtime_ms": self._downtime.percentiles_ms(),
            "ttft_ms": self._ttft.percentiles_ms(),
            "tpot_ms": self._tpot.percentiles_ms(),
            "itl_ms": self._itl.percentiles_ms(),
            "e2e_ms": self._e2e.percentiles_ms(),
            "preemptions": count["preemptions"],
            "parks": activity.entered["parked"],
            "wakes": activity.entered["waking"],
            "workers_lost": activity.entered["lost"],
            "worker_kv": activity.kv(),
            "ready_s": activity.ready_s(self._start_s or 0.0),
            "costs": self._costs(),
        }

    def _costs(self) -> dict[str, Any]:
        """Input of `CostModel.fitted`."""
        fits = {"steps": self._steps, "transfers": self._transfers, "wakes": self._wakes}
        return {name: fit.to_dict() for name, fit in fits.items()}

    def _migrations(self) -> dict[str, int]:
        failed = sum(self._outcomes.values()) - self._outcomes["moved"]
        return {mode: self._moved[mode] for mode in ("transfer", "recompute", "split")} | {
            "failed": failed  # every outcome but "moved"; see `migration_outcomes`
        }

    def series(self, now: float) -> Series:
        """The time series up to `now`."""
        start_s = self._start_s or 0.0
        return Series(
            end_s=now - start_s,
            workers=self._activity.series(start_s),
            moves=[
                replace(m, start_s=m.start_s - start_s, end_s=m.end_s - start_s)
                for m in self._moves.items
            ],
            preemptions=[(t - start_s, worker) for t, worker in self._preempted.items],
            report=self.report(now),
        )
