"""A worker: the loop around batch scheduler, engine and transport."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.costs import UNKNOWN, CostModel, StepBudget, StepSeconds, StepTimes
from mellmpi.protocol import (
    DATA_PLANE,
    SCHEDULER,
    Address,
    BlocksArrived,
    BlocksSent,
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
    WorkerLost,
    WorkerReady,
)
from mellmpi.transport import Arena, Transfer, Transport
from mellmpi.worker import BatchScheduler

log = logging.getLogger(__name__)

REPORT_EVERY_S = 0.02  # the scheduler hears of tokens at most so much later
FEW_BLOCKS = 4  # to receive: nothing else may be missing of a sequence that has stopped elsewhere
PATIENCE = 0.25  # of a step they are waited for: missing the next one would cost a whole step
PATIENCE_S = 0.02  # at most, after a step that prefilled
LEARN_EVERY_S = 0.1  # reports of steps are gathered for so long
IDLE_S = 1.0  # longest sleep with nothing to do; whatever comes ends it


class Engine(Protocol):
    """What a worker asks of the engine (mellmpi.engine.executor.Executor)."""

    arena: Arena

    @property
    def models(self) -> tuple[HostedModel, ...]: ...
    @property
    def arithmetic(self) -> str: ...
    def execute(self, plan: StepPlan) -> StepResult: ...
    def release(self) -> None: ...


class SchedulerLost(Exception):
    """Rank 0 has died; a worker alone has nothing to do."""


class Worker:
    """One worker's loop body. Between two calls of `turn` it holds no unfinished business."""

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
        """`measure`: what steps take, tried once; unknown steps are limited by tokens alone."""
        self._measure, self._measured = measure, UNKNOWN
        self._times = StepTimes(CostModel())
        self._learned_s = 0.0
        self._transport, self._build = transport, build
        self._clock, self._patience = clock, patience
        self._limits, self._cache = batch, cache
        self._transfers: list[tuple[Transfer, Callable[[Transfer], Any] | None]] = []
        self._few: list[tuple[int, Transfer]] = []  # small ones, by epoch
        self._stopped: set[int] = set()  # epochs whose last header has just come
        self._acked = 0
        self._steps, self._step_s, self._reported_s = 0, 0.0, 0.0
        self._stepped_s = 0.0  # when the last turn ended, if it had a step
        self._last_step_s = 0.0  # what the last step took
        self._engine: Engine | None = None  # None: parked
        self.stopped = False

    def start(self) -> None:
        """Load weights, allocate the arena, and tell the scheduler. Also the way to wake."""
        began_s = self._clock()
        engine = self._engine = self._build()
        arena = engine.arena
        self._transport.attach(arena)
        self._batch = BatchScheduler(
            engine.models, arena.num_blocks, self._acked, self._limits, self._cache
        )
        self._begin_budget(engine)
        ready = WorkerReady(
            models=tuple(m.kv for m in engine.models),
            capacity_bytes=arena.num_blocks * arena.block_bytes,
            max_num_seqs=self._limits.max_num_seqs,
            acked=self._acked,
            wake_s=self._clock() - began_s,
            max_batched_tokens=self._limits.max_num_batched_tokens,
            target_step_s=self._limits.target_step_s,
            step_s=self._measured if any(self._measured) else (),
            arithmetic=engine.arithmetic,
        )
        self._transport.send(SCHEDULER, ready)

    def _begin_budget(self, engine: Engine) -> None:
        """What is known of steps stays known while a worker is parked."""
        if not any(self._measured):
            self._measured = self._measure(engine)
            budget = StepBudget(self._limits.max_num_batched_tokens, self._limits.target_step_s)
            self._times.begin(self._transport.worker, budget, self._measured)
        self._learn()

    def _learn(self) -> None:
        if any(self._measured):
            self._batch.step_seconds = self._times.seconds(self._transport.worker)

    def turn(self) -> bool:
        """Messages in, at most one step, reports out. False: there was nothing to do."""
        began_s = self._stepped_s or self._clock()
        messages = self._transport.poll()
        for source, message in messages:
            self._message(source, message)
        moved = self._transport.progress()
        self._await_stopped()
        moved |= self._finish_transfers()
        stepped = self._engine is not None and self._step(self._engine)
        now = self._clock()
        # The whole turn: where workers share cores, much of the waiting is between the steps.
        self._last_step_s = now - began_s if stepped else self._last_step_s
        self._step_s += now - began_s if stepped else 0.0
        self._stepped_s = now if stepped else 0.0
        if not stepped or now - self._reported_s >= REPORT_EVERY_S:
            self._report(now)
        return bool(messages or moved or stepped)

    def wait(self) -> None:
        """Sleep until something may have come."""
        self._transport.wait(IDLE_S)

    # --- messages -------------------------------------------------------------------------------

    def _message(self, source: Address, message: Any) -> None:
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
                    self._stopped.add(message.epoch)
                self._route(self._batch.handle(source, message))

    def _route(self, commands: list[tuple[Address, Any]]) -> None:
        for destination, command in commands:
            if destination == DATA_PLANE:
                self._move_blocks(command)
                continue
            if isinstance(command, Parked):
                self._park()
            if isinstance(command, KvReceived) or (isinstance(command, KvPayload) and command.last):
                self._reported_s = -math.inf  # rank 0 shall see the pause of a move as it is
            self._transport.send(int(destination), command)

    def _park(self) -> None:
        assert self._engine is not None
        self._acked = self._batch.acked
        self._transport.attach(None)
        self._engine.release()
        self._engine = None

    # --- blocks ---------------------------------------------------------------------------------

    def _move_blocks(self, order: Any) -> None:
        transport = self._transport
        match order:
            case SendBlocks(request_id, epoch, dst, tag, block_ids):
                transfer = transport.send_blocks(dst, tag, block_ids)
                self._transfers.append((transfer, lambda _: BlocksSent(request_id, epoch, tag)))
            case ReceiveBlocks(request_id, epoch, src, tag, block_ids):
                transfer = transport.receive_blocks(src, tag, block_ids)
                self._few += [(epoch, transfer)] if len(block_ids) <= FEW_BLOCKS else []
                self._transfers.append(
                    (
                        transfer,
                        lambda t: BlocksArrived(
                            request_id, epoch, not t.failed, t.elapsed_s, tag, t.reason
                        ),
                    )
                )
            case DrainBlocks(src, tag, num_blocks):
                self._transfers.append((transport.drain_blocks(src, tag, num_blocks), None))

    def _await_stopped(self) -> None:
        """Give what has stopped elsewhere a moment to come in before the next step begins."""
        awaited = [transfer for epoch, transfer in self._few if epoch in self._stopped]
        stop_s = self._clock() + min(self._patience * self._last_step_s, PATIENCE_S)
        while any(not t.done for t in awaited) and (left := stop_s - self._clock()) > 0:
            self._transport.wait(left)
            self._transport.progress()
        self._few = [entry for entry in self._few if not entry[1].done]
        self._stopped.clear()

    def _finish_transfers(self) -> bool:
        # Looked at once: a transfer may end at any moment, and must be in one of the two.
        under_way, done = [], []
        for entry in self._transfers:
            (done if entry[0].done else under_way).append(entry)
        self._transfers = under_way
        for transfer, event in done:
            if event is not None:
                self._route(self._batch.handle(DATA_PLANE, event(transfer)))
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
                self._learn_from(report, now)

    def _learn_from(self, report: StepReport, now: float) -> None:
        self._times.add(self._transport.worker, report)
        if now - self._learned_s >= LEARN_EVERY_S and self._times.fold():
            self._learned_s = now
            self._learn()
            self._steps, self._step_s, self._reported_s = 0, 0.0, now
