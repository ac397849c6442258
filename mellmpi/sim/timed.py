"""Replays a load on workers whose steps, transfers and wakes take time."""

from collections.abc import Callable
from functools import partial

import numpy as np

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import (
    FRONT,
    SCHEDULER,
    Address,
    Assign,
    DataPlaneCommand,
    Emit,
    KvFailed,
    KvPayload,
    KvReceived,
    MigrationStarted,
    ModelKv,
    Parked,
    Preempted,
    SchedulerCommand,
    SchedulerEvent,
    StepReport,
    Submit,
    Unfreeze,
    Wake,
    WorkerCommand,
    WorkerEvent,
)
from mellmpi.scheduler import Commands, WorkerState
from mellmpi.sim.bound import Load
from mellmpi.sim.fast import CountingExecutor, FastWorker
from mellmpi.sim.pace import Clock, Pace, Transfers
from mellmpi.sim.progress import STOP, Progress
from mellmpi.sim.replay import Replay, Settings, Tally
from mellmpi.sim.worker import WorkerSpec
from mellmpi.worker import BatchCommand

MESSAGE_S = 1e-4  # latency of a message between the loops of two ranks


class TimedReplay(Replay):
    """Replay with timed steps, transfers and wakes; messages wait for the end of a step."""

    def __init__(
        self,
        load: Load,
        name: str,
        hosts: list[tuple[ModelKv, ...]],
        cost: CostModel,
        limits: BatchConfig,
        settings: Settings,
    ):
        super().__init__(load, name, hosts, cost, settings)
        self.clock, lengths = Clock(), load.outputs.tolist()
        self.paces: list[Pace] = []  # worker w is at w - 1
        for w, models in enumerate(hosts, start=1):
            num_blocks = load.capacity // models[0].block_bytes
            spec = WorkerSpec(
                models,
                num_blocks,
                limits,
                CacheConfig(),
                cost.wake_s,
                lambda *_: CountingExecutor(lengths),
                cost.step_seconds,
            )
            worker = FastWorker(w, spec, cost, lengths)
            self.paces.append(Pace(worker, self.clock, self._send, self._report))
        block_bytes = hosts[0][0].block_bytes  # equal for all models
        self.transfers = Transfers(
            self.clock, lambda n: cost.transfer_s(n * block_bytes), self._write
        )
        self._parked: set[int] = set()  # workers
        self._arrival_s = (load.arrivals / load.rate).tolist()
        self._next = 0  # index of the next request to arrive
        self._waiting_s: dict[int, float] = {}  # request on no worker -> since when
        self._frozen_s: dict[int, float] = {}  # request frozen by a migration -> since when
        self._first_s: dict[int, float] = {}  # request -> time of its first token

    def run(self, progress: Callable[[int], None]) -> Tally:
        """Replay until the last request has ended. Calls `progress` with the number of arrivals."""
        load, began_s = self.load, self._arrival_s[0]
        self.clock.now = began_s
        for pace in self.paces:
            self._to_scheduler(pace.worker.id, pace.worker.wake())
        self._park_at_start()
        self._schedule_arrival(progress)
        self.clock.at(began_s + self.settings.tick_s / 2, self._tick)
        for at_s in (load.samples / load.rate).tolist():
            self.clock.at(at_s, lambda: self._sample(self._used_bytes()))
        while self.clock.next():
            pass
        return self.tally

    def _park_at_start(self) -> None:
        """Park all workers but the first, before the first arrival."""
        self._route(self._park_all())
        while self.scheduler.registry.ledger.workers(WorkerState.PARKING) and self.clock.next():
            pass
        self.tally.wakes = 0

    def _has_requests(self) -> bool:
        return self._next < len(self._arrival_s) or bool(self.scheduler.records)

    def _schedule_arrival(self, progress: Callable[[int], None]) -> None:
        if self._next < len(self._arrival_s):
            self.clock.at(self._arrival_s[self._next], lambda: self._arrive(progress))

    def _arrive(self, progress: Callable[[int], None]) -> None:
        i, self._next = self._next, self._next + 1
        self._progress()
        self._waiting_s[i] = self.clock.now
        self._to_scheduler(FRONT, Submit(self._request(i)))
        progress(self._next)
        self._schedule_arrival(progress)

    def _tick(self) -> None:
        self._progress()
        self._route(self.scheduler.tick(self.clock.now))
        self._check_enough()
        if self._has_requests():
            self.clock.at(self.clock.now + self.settings.tick_s, self._tick)

    # --- messages -------------------------------------------------------------------------------

    def _to_scheduler(self, source: Address, event: SchedulerEvent) -> None:
        self._route(self.scheduler.handle(source, event, self.clock.now))

    def _route(self, commands: Commands) -> None:
        for destination, command in commands:
            self._measure(command)
            if isinstance(command, WorkerCommand):
                pace = self.paces[int(destination) - 1]
                self._later(partial(self._deliver, pace, command))
            else:
                self._observe(command, self.clock.now)

    def _later(self, action: Callable[[], None]) -> None:
        self.clock.at(self.clock.now + MESSAGE_S, action)

    def _deliver(self, pace: Pace, command: WorkerCommand) -> None:
        pace.write(SCHEDULER, command)
        if isinstance(command, Wake):
            wake_s = pace.worker.spec.wake_s
            self.clock.at(self.clock.now + wake_s, lambda: self._awake(pace))

    def _write(self, w: int, source: Address, message: WorkerEvent) -> None:
        self.paces[w - 1].write(source, message)

    def _awake(self, pace: Pace) -> None:
        self._parked.discard(pace.worker.id)
        self._post(pace, pace.worker.wake())

    def _send(self, pace: Pace, destination: Address, command: BatchCommand) -> None:
        """Send a message of a worker."""
        match command:
            case KvPayload(request_id=i, last=True):
                self._frozen_s[i] = self.clock.now
            case KvReceived(request_id=i) | KvFailed(request_id=i):
                self._end_stall(self._frozen_s, i)
            case Parked():
                self._parked.add(pace.worker.id)
        if isinstance(command, DataPlaneCommand):
            self.transfers.handle(pace.worker.id, command)
        elif isinstance(command, SchedulerEvent):
            self._post(pace, command)
        else:
            self._later(partial(self._write, int(destination), pace.worker.id, command))

    def _post(self, pace: Pace, message: SchedulerEvent) -> None:
        self._later(lambda: self._to_scheduler(pace.worker.id, message))

    def _report(self, pace: Pace) -> None:
        if pace.worker.id not in self._parked and (report := pace.worker.report()) is not None:
            self._post(pace, report)

    def _progress(self) -> None:
        """Pass the reports of all workers to the scheduler at once."""
        reports: list[tuple[int, StepReport]] = []
        for pace in self.paces:
            pace.catch_up()
            w = pace.worker.id
            if w in self._parked or (report := pace.worker.report()) is None:
                continue
            if self._is_special(report):
                self._to_scheduler(w, report)
            else:
                reports.append((w, report))
        self._route(self.scheduler.advance(self._gathered(reports), self.clock.now))

    def _is_special(self, report: StepReport) -> bool:
        """Whether it has a preemption, an end, or a first token (also after a preemption)."""
        firsts = (i not in self._first_s or i in self._waiting_s for i in report.request_ids)
        return bool(report.preempted) or STOP in report.tokens or any(firsts)

    def _gathered(self, reports: list[tuple[int, StepReport]]) -> Progress:
        decoded = np.zeros(len(self.paces) + 1)
        slots, outputs, records = [], [], self.scheduler.records
        for w, report in reports:
            decoded[w] = report.decode_tokens
            runs = zip(report.request_ids, report.epochs, report.firsts, report.counts, strict=True)
            for request_id, epoch, first, count in runs:
                record = records.get(request_id)
                if record is not None and record.epoch == epoch:
                    slots.append(record.slot)
                    outputs.append(first + count)
        return Progress(
            np.array([w for w, _ in reports], np.int64),
            np.array([report.free_bytes for _, report in reports], np.int64),
            [report.acked for _, report in reports],
            decoded,
            np.array(slots, np.int64),
            np.array(outputs, np.int64),
        )

    # --- measurements ---------------------------------------------------------------------------

    def _used_bytes(self) -> int:
        for pace in self.paces:
            pace.catch_up()
        batches = [pace.worker.batch for pace in self.paces]
        return sum((b.pool.num_blocks - b.pool.num_free) * b.block_bytes for b in batches)

    def _measure(self, command: SchedulerCommand) -> None:
        """Record TTFT and stalls: time on no worker, of recompute, and frozen by a migration."""
        now = self.clock.now
        match command:
            case Emit(request_id=i, first=first):
                self._end_stall(self._waiting_s, i)
                if not first:
                    self._first_s[i] = now
                    self.tally.ttft_s[i] = now - self._arrival_s[i]
                if command.finish_reason is not None:
                    self._finished(i, first + len(command.tokens))
            case Assign() if not command.outputs:
                self._end_stall(self._waiting_s, command.request.id)
            case Preempted(request_id=i):
                self._waiting_s.setdefault(i, now)
            case MigrationStarted(request_id=i, mode="recompute"):
                self._waiting_s.setdefault(i, now)
            case Unfreeze(request_id=i):
                self._end_stall(self._frozen_s, i)

    def _end_stall(self, since_s: dict[int, float], i: int) -> None:
        if (began_s := since_s.pop(i, None)) is not None:
            stalls = self.tally.stall_s
            stalls[i] = stalls.get(i, 0.0) + self.clock.now - began_s

    def _finished(self, i: int, num_tokens: int) -> None:
        self._end_stall(self._frozen_s, i)
        self.tally.finished[i] = self.clock.now
        self.tally.stall_s.setdefault(i, 0.0)
        first_s = self._first_s.pop(i, self.clock.now)
        self.tally.tpot_s[i] = (self.clock.now - first_s) / max(1, num_tokens - 1)
