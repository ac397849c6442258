"""The main loop of a worker: connects batch scheduler, engine and transport."""

import logging
import math
import time
from collections.abc import Callable
from typing import Protocol

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.costs import UNKNOWN, CostModel, StepBudget, StepSeconds, StepTimes
from mellmpi.protocol import (
    DATA_PLANE,
    SCHEDULER,
    Address,
    BlocksArrived,
    BlocksSent,
    DataPlaneCommand,
    DrainBlocks,
    HostedModel,
    KvPayload,
    KvReceived,
    Parked,
    ReceiveBlocks,
    SendBlocks,
    StepPlan,
    StepReport,
    StepResult,
    Stop,
    Wake,
    WorkerEvent,
    WorkerLost,
    WorkerReady,
)
from mellmpi.transport import Arena, Transfer, Transport
from mellmpi.worker import BatchScheduler, BlockResult, Outbox

log = logging.getLogger(__name__)

REPORT_EVERY_S = 0.02  # interval of step reports to the scheduler
# A migrated sequence whose source has stopped often lacks only its last, small transfer. The worker
# waits for it a part of a step: a sequence that misses the next step loses a whole step.
SMALL_RECEIVE_BLOCKS = 4
PATIENCE = 0.25  # longest wait, as a share of the last step
MAX_WAIT_S = 0.02  # longest wait after a long step
UPDATE_EVERY_S = 0.1  # interval of fits of the step times
IDLE_S = 1.0  # longest sleep; messages, transfers and `wake` end it


class Engine(Protocol):
    """The interface of an engine (mellmpi.engine)."""

    @property
    def arena(self) -> Arena: ...
    @property
    def models(self) -> tuple[HostedModel, ...]: ...
    @property
    def arithmetic(self) -> str: ...
    @property
    def warm_up_s(self) -> float: ...
    def execute(self, plan: StepPlan) -> StepResult: ...
    def release(self) -> None: ...


# A transfer, and the event that reports its end to the batch scheduler; None: no event.
PendingTransfer = tuple[Transfer, Callable[[Transfer], BlockResult] | None]


class SchedulerLost(Exception):
    """Rank 0 has died, so that the worker must end."""


class Worker:
    """The loop body of one worker: call `run_once`, and `wait` when it returns False."""

    def __init__(
        self,
        transport: Transport,
        build: Callable[[], Engine],
        batch: BatchConfig,
        cache: CacheConfig,
        clock: Callable[[], float] = time.perf_counter,
        patience: float = PATIENCE,
        measure: Callable[[Engine], StepSeconds] = lambda _: UNKNOWN,
    ):
        """
        build     makes the engine at the start, and again at each wake-up
        clock     seconds
        patience  see PATIENCE
        measure   measures step times, called once; without them, tokens alone limit a step
        """
        self._measure, self._measured = measure, UNKNOWN
        self._times = StepTimes(CostModel())
        self._updated_s = 0.0
        self._transport, self._build = transport, build
        self._clock, self._patience = clock, patience
        self._limits, self._cache = batch, cache
        self._transfers: list[PendingTransfer] = []
        self._small_receives: list[tuple[int, Transfer]] = []  # (epoch, transfer)
        self._final_headers: set[int] = set()  # epochs whose last header arrived in this iteration
        self._acked = 0
        self._steps, self._step_s, self._reported_s = 0, 0.0, 0.0
        self._stepped_s = 0.0  # end of the previous iteration; 0 if it had no step
        self._last_step_s = 0.0  # duration of the last iteration with a step
        self._engine: Engine | None = None  # None: parked
        self.stopped = False

    def start(self) -> None:
        """Load the weights, allocate the arena and send WorkerReady. Also used to wake up."""
        began_s = self._clock()
        engine = self._engine = self._build()
        arena = engine.arena
        self._transport.attach(arena)
        self._batch = BatchScheduler(
            engine.models, arena.num_blocks, self._acked, self._limits, self._cache
        )
        wake_s = self._clock() - began_s - engine.warm_up_s  # a later wake compiles nothing
        self._measure_steps(engine)
        ready = WorkerReady(
            models=tuple(m.kv for m in engine.models),
            capacity_bytes=arena.num_blocks * arena.block_bytes,
            max_num_seqs=self._limits.max_num_seqs,
            acked=self._acked,
            wake_s=max(0.0, wake_s),
            max_batched_tokens=self._limits.max_num_batched_tokens,
            target_step_s=self._limits.target_step_s,
            step_s=self._measured if any(self._measured) else (),
            arithmetic=engine.arithmetic,
        )
        self._transport.send(SCHEDULER, ready)

    def _measure_steps(self, engine: Engine) -> None:
        """Measure step times at the first start; they stay valid while the worker is parked."""
        if not any(self._measured):
            self._measured = self._measure(engine)
            budget = StepBudget(self._limits.max_num_batched_tokens, self._limits.target_step_s)
            self._times.begin(self._transport.worker, budget, self._measured)
        self._update_step_seconds()

    def _update_step_seconds(self) -> None:
        if any(self._measured):
            self._batch.step_seconds = self._times.seconds(self._transport.worker)

    def run_once(self) -> bool:
        """Handle messages, execute at most one step, send reports. False: there was no work."""
        began_s = self._stepped_s or self._clock()
        messages = self._transport.poll()
        for source, message in messages:
            self._handle(source, message)
        moved = self._transport.progress()
        self._await_small_receives()
        moved |= self._finish_transfers()
        stepped = self._engine is not None and self._step(self._engine)
        now = self._clock()
        # Includes the time between steps, where workers that share cores wait for each other.
        self._last_step_s = now - began_s if stepped else self._last_step_s
        self._step_s += now - began_s if stepped else 0.0
        self._stepped_s = now if stepped else 0.0
        if not stepped or now - self._reported_s >= REPORT_EVERY_S:
            self._report(now)
        return bool(messages or moved or stepped)

    def wait(self) -> None:
        """Sleep until there may be work."""
        self._transport.wait(IDLE_S)

    # --- messages -------------------------------------------------------------------------------

    def _handle(self, source: Address, message: WorkerEvent | WorkerLost | Stop) -> None:
        match message:
            case Stop():
                self.stopped = True
            case Wake():
                self._acked += 1
                self.start()
            case WorkerLost(worker):
                if worker == SCHEDULER:
                    raise SchedulerLost
            case _:
                if isinstance(message, KvPayload) and message.last:
                    self._final_headers.add(message.epoch)
                self._route(self._batch.handle(source, message))

    def _route(self, outbox: Outbox) -> None:
        for destination, message in outbox:
            if isinstance(message, DataPlaneCommand):
                self._begin_transfer(message)
                continue
            if isinstance(message, Parked):
                self._park()
            if isinstance(message, KvReceived) or (isinstance(message, KvPayload) and message.last):
                self._reported_s = -math.inf  # report now: rank 0 measures the migration's downtime
            self._transport.send(int(destination), message)

    def _park(self) -> None:
        assert self._engine is not None
        self._acked = self._batch.acked
        self._transport.attach(None)
        self._engine.release()
        self._engine = None

    # --- blocks ---------------------------------------------------------------------------------

    def _begin_transfer(self, order: DataPlaneCommand) -> None:
        transport = self._transport
        match order:
            case SendBlocks(request_id, epoch, dst, tag, block_ids):
                transfer = transport.send_blocks(dst, tag, block_ids)
                self._transfers.append((transfer, lambda _: BlocksSent(request_id, epoch, tag)))
            case ReceiveBlocks(request_id, epoch, src, tag, block_ids):
                transfer = transport.receive_blocks(src, tag, block_ids)
                if len(block_ids) <= SMALL_RECEIVE_BLOCKS:
                    self._small_receives.append((epoch, transfer))
                result: Callable[[Transfer], BlockResult] = lambda t: BlocksArrived(  # noqa: E731
                    request_id, epoch, not t.failed, t.elapsed_s, tag, t.reason
                )
                self._transfers.append((transfer, result))
            case DrainBlocks(src, tag, num_blocks):
                self._transfers.append((transport.drain_blocks(src, tag, num_blocks), None))

    def _await_small_receives(self) -> None:
        """Wait briefly for the last blocks of sequences that have stopped at their source."""
        awaited = [t for epoch, t in self._small_receives if epoch in self._final_headers]
        stop_s = self._clock() + min(self._patience * self._last_step_s, MAX_WAIT_S)
        while any(not t.done for t in awaited) and (left := stop_s - self._clock()) > 0:
            self._transport.wait(left)
            self._transport.progress()
        self._small_receives = [entry for entry in self._small_receives if not entry[1].done]
        self._final_headers.clear()

    def _finish_transfers(self) -> bool:
        # Reads `done` once per transfer: another thread may set it between two reads.
        in_progress: list[PendingTransfer] = []
        done: list[PendingTransfer] = []
        for entry in self._transfers:
            (done if entry[0].done else in_progress).append(entry)
        self._transfers = in_progress
        for transfer, result in done:
            if result is not None:
                self._route(self._batch.handle(DATA_PLANE, result(transfer)))
        return bool(done)

    # --- steps ----------------------------------------------------------------------------------

    def _step(self, engine: Engine) -> bool:
        plan = self._batch.plan()
        if plan is None:
            return False
        result = engine.execute(plan)
        self._steps += 1
        self._route(self._batch.commit(plan, result))
        return True

    def _report(self, now: float) -> None:
        if self._engine is None:
            return
        report = self._batch.report(self._steps, self._step_s)
        if report is not None:
            self._transport.send(SCHEDULER, report)
            if any(self._measured):
                self._add_step_times(report, now)
            self._steps, self._step_s, self._reported_s = 0, 0.0, now

    def _add_step_times(self, report: StepReport, now: float) -> None:
        self._times.add(self._transport.worker, report)
        if now - self._updated_s >= UPDATE_EVERY_S and self._times.fold():
            self._updated_s = now
            self._update_step_seconds()
