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
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mellmpi import protocol as p
from mellmpi.telemetry.activity import Activity
from mellmpi.telemetry.cells import QUEUE, Cells, Rows
from mellmpi.telemetry.moves import Live, Moves
from mellmpi.telemetry.series import Distribution, NormalEquations, Sample, Series


class Metrics:
    """Observes every event that rank 0 receives and every command that it sends.

    Call `observe` with an event, then `command` with each command that follows from it, with a
    `now` that never decreases: tokens are credited to the worker whose report is being handled.
    The cost is per Emit and per report, not per token.
    """

    def __init__(self) -> None:
        self._start_s: float | None = None
        self._live: dict[int, Live] = {}
        self._activity, self._cells, self.moves = Activity(), Cells(), Moves()
        self._preempted = Sample[tuple[float, int]]()  # (time, worker)
        self._reporter: int | None = None  # worker whose StepReport is being handled
        self._counts: Counter[str] = Counter()
        self._ttft, self._tpot, self._itl = Distribution(), Distribution(), Distribution()
        self._e2e = Distribution()
        # Fits of seconds by these counts:
        self._steps = NormalEquations("steps", "prefill_tokens", "decode_tokens")
        self._wakes = NormalEquations("wakes")

    # --- input ---

    def observe(self, now: float, source: p.Address, event: Any) -> None:
        """Rank 0 has received `event` from `source`, and is about to handle it."""
        self._reporter = None
        match event:
            case p.StepReport() if isinstance(source, int):
                self._reporter = source
                self._activity.used(now, source, event.free_bytes)
                self._stepped(source, event)
            case p.Submit():
                self._submitted(now, event.request)
            case p.Cancel(request_id, "stop") if request_id in self._live:
                self._finished(request_id, self._live[request_id], "stop")
            case p.Cancel():
                self._cancelled(event.request_id)
            case p.WorkerReady() if isinstance(source, int):
                if self._activity.state(source) == "waking":
                    # A first start is no sample: it may convert weights, beside other starts.
                    self._wakes.add((1,), event.wake_s)
                self._activity.ready(now, source, event)
                self._cells.announce(source, (kv.model for kv in event.models))
            case p.Parked() if isinstance(source, int):
                self._activity.enter(now, source, "parked")
            case p.WorkerLost():
                self._activity.enter(now, event.worker, "lost")
                self._lost(event.worker)

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
            case p.Assign() if isinstance(destination, int):
                self._assigned(now, destination, command.request.id)
            case p.Rejected():
                self._rejected(command.request_id)
            case p.Park() if isinstance(destination, int):
                self._activity.enter(now, destination, "parking")
            case p.Wake() if isinstance(destination, int):
                self._activity.enter(now, destination, "waking")
            case p.WorkerChanged():
                self._activity.enter(now, command.worker, command.state)
            case p.MigrationStarted():
                self.moves.started(now, self._live.get(command.request_id), command)
            case p.MigrationEnded():
                self._migration_ended(now, command)
            case p.Preempted():
                self._counts["preemptions"] += 1
                self._preempted.add((now, command.worker))
                self._queued(command)

    # --- steps ---

    def _stepped(self, worker: int, report: p.StepReport) -> None:
        if report.steps:
            x = (report.steps, report.prefill_tokens, report.decode_tokens)
            self._steps.add(x, report.step_s, weight=1 / report.steps)
        for request_id, num_cached in report.cached:
            if live := self._live.get(request_id):
                cell = self._cells.of(live.model, worker)
                cell.prefix_queries += live.num_prompt
                cell.prefix_hits += num_cached

    # --- requests ---

    def _submitted(self, now: float, request: p.Request) -> None:
        if self._start_s is None:
            self._start_s = now
            self._activity.begin(now)
        model = self._cells.known(request.model)
        cell = self._cells.of(model, QUEUE)
        self._live[request.id] = Live(now, len(request.prompt), model, cell)
        self._counts["requests"] += 1
        self._counts["prompt_tokens"] += len(request.prompt)

    def _assigned(self, now: float, worker: int, request_id: int) -> None:
        if (live := self._live.get(request_id)) is None:
            return
        self._own(live, worker)
        if not live.placed:
            live.placed = True
            live.cell.queue_time.add(now - live.submit_s)
            live.cell.prompt_tokens += live.num_prompt

    def _own(self, live: Live, worker: int) -> None:
        live.worker, live.cell = worker, self._cells.of(live.model, worker)

    def _cancelled(self, request_id: int) -> None:
        if (live := self._live.pop(request_id, None)) is not None:
            self._counts["cancelled"] += 1
            live.cell.finished["abort"] += 1

    def _rejected(self, request_id: int) -> None:
        live = self._live.pop(request_id, None)
        if live is None:  # refused by the frontend before a Submit
            self._counts["requests"] += 1
        else:
            self._counts["prompt_tokens"] -= live.num_prompt
        self._counts["failed"] += 1
        cell = live.cell if live is not None else self._cells.of("", QUEUE)
        cell.finished["error"] += 1

    def _emitted(self, now: float, emit: p.Emit) -> None:
        live = self._live.get(emit.request_id)
        if live is None:
            return
        if emit.tokens:
            cell = live.cell
            if live.num_tokens:
                gap_s = now - live.last_s
                self._itl.add(gap_s)
                cell.itl.add(gap_s)
            else:
                live.first_s = now
                self._ttft.add(now - live.submit_s)
                cell.ttft.add(now - live.submit_s)
            if self._reporter is not None:
                if live.src is not None or live.moved_to is not None:
                    self.moves.computed(now, live, self._reporter)
                live.reported_s = now
            live.last_s = now
            live.num_tokens += len(emit.tokens)
            cell.generation_tokens += len(emit.tokens)
        if emit.finish_reason is not None:
            self._finished(emit.request_id, live, emit.finish_reason)

    def _finished(self, request_id: int, live: Live, reason: str) -> None:
        self._counts["completed"] += 1
        took_s, cell = live.last_s - live.submit_s, live.cell
        self._e2e.add(took_s)
        cell.e2e.add(took_s)
        cell.prompts.add(live.num_prompt)
        cell.outputs.add(live.num_tokens)
        cell.finished[reason] += 1
        if live.num_tokens > 1:
            self._tpot.add((live.last_s - live.first_s) / (live.num_tokens - 1))
        del self._live[request_id]

    # --- changes of the owner ---

    def _migration_ended(self, now: float, ended: p.MigrationEnded) -> None:
        live = self._live.get(ended.request_id)
        self.moves.ended(now, live, ended)
        if live is not None and ended.outcome == "moved":
            self._own(live, ended.dst)

    def _queued(self, preempted: p.Preempted) -> None:
        """The wait in the queue is no downtime."""
        if live := self._live.get(preempted.request_id):
            self._cells.of(live.model, preempted.worker).preemptions += 1
            self._own(live, QUEUE)
            live.src, live.moved_to = None, None

    def _lost(self, worker: int) -> None:
        for live in self._live.values():
            if live.worker == worker:
                self._own(live, QUEUE)
            if live.moved_to == worker:  # the next token ends a recovery, not a migration
                live.src, live.moved_to = None, None

    # --- output ---

    def report(self, now: float) -> dict[str, Any]:
        """The run so far, as plain data for JSON. Percentiles are None without samples."""
        wall_s = 0.0 if self._start_s is None else now - self._start_s
        activity, count = self._activity, self._counts
        output_tokens = sum(cell.generation_tokens for cell in self._cells.all())
        active_s = 0.0 if self._start_s is None else activity.active_s(now)
        return {
            "requests": count["requests"],
            "completed": count["completed"],
            "failed": count["failed"],  # rejected: they could never be served
            "cancelled": count["cancelled"],
            "wall_s": wall_s,
            "prompt_tokens": count["prompt_tokens"],  # of all but rejected requests
            "output_tokens": output_tokens,
            "output_throughput": output_tokens / wall_s if wall_s else 0.0,
            "gpu_seconds_active": active_s,
            "gpu_seconds_total": len(activity) * wall_s,
            "workers": len(activity),
            "active_workers_mean": active_s / wall_s if wall_s else 0.0,
            "active_workers_peak": activity.peak,
            **self.moves.report(),
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
        fits = {"steps": self._steps, "transfers": self.moves.transfers, "wakes": self._wakes}
        return {name: fit.to_dict() for name, fit in fits.items()}

    def samples(self, now: float, links: Iterable[tuple[int, int, float]] = ()) -> dict[str, Rows]:
        """{metric: samples}, plain data for `prometheus.render`, also in another process.

        links  (source host, destination host, bytes a second)
        """
        activity, start_s = self._activity, self._start_s
        active_s = 0.0 if start_s is None else activity.active_s(now)
        wall_s = 0.0 if start_s is None else now - start_s
        owners = Counter((live.model, live.worker) for live in self._live.values())
        return {
            **self._cells.rows(owners, activity.usage()),
            **self.moves.rows(),
            "link_bandwidth_bytes_per_second": [
                ((str(src), str(dst), "network" if src != dst else "host"), Bps)
                for src, dst, Bps in links
            ],
            "active_gpus": [((), activity.active)],
            "gpu_seconds": [((), active_s)],
            "gpu_seconds_all_on": [((), len(activity) * wall_s)],
        }

    def series(self, now: float) -> Series:
        """The time series up to `now`."""
        start_s = self._start_s or 0.0
        return Series(
            end_s=now - start_s,
            workers=self._activity.series(start_s),
            moves=[
                replace(m, start_s=m.start_s - start_s, end_s=m.end_s - start_s)
                for m in self.moves.records.items
            ],
            preemptions=[(t - start_s, worker) for t, worker in self._preempted.items],
            report=self.report(now),
        )
