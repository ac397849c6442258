"""The timing of simulated workers: begin and end of steps, and of block transfers."""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from mellmpi.protocol import (
    DATA_PLANE,
    Address,
    BlocksArrived,
    BlocksSent,
    DataPlaneCommand,
    DrainBlocks,
    ReceiveBlocks,
    SendBlocks,
    WorkerEvent,
)
from mellmpi.sim.fast import FastWorker
from mellmpi.worker import BatchCommand, BlockResult, Outbox

EDGE = 1e-9  # seconds: a step that ends within this time has ended


@dataclass
class Clock:
    """Actions in order of time; those of the same time in the order of scheduling."""

    now: float = 0.0  # seconds
    _heap: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=count)

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (time_s, next(self._order), action))

    def next(self) -> bool:
        """Run the next action. False if there is none."""
        if not self._heap:
            return False
        self.now, _, action = heapq.heappop(self._heap)
        action()
        return True


@dataclass(eq=False)
class Pace:
    """Runs a worker on the clock: messages wait until the current step ends."""

    worker: FastWorker
    clock: Clock
    send: Callable[["Pace", Address, BatchCommand], None]  # a message of the worker
    report: Callable[["Pace"], None]  # called when the inbox is empty and after steps
    _begun_s: float = 0.0  # begin of the first step that is not applied
    _version: int = 0  # of the end on the clock

    def write(self, source: Address, message: WorkerEvent) -> None:
        """Deliver a message; the worker handles it when no step is in progress."""
        self.worker.inbox.append((source, message))
        if self.worker.plan is None:
            return self._between_steps()
        self.catch_up()
        self.worker.steps_left = 1
        self._schedule_end()

    def catch_up(self) -> None:
        """Apply the steps that are over, except the last of the identical ones: it is an event."""
        worker, passed_s = self.worker, self.clock.now - self._begun_s + EDGE
        if worker.plan is None or worker.steps_left == 1 or passed_s < worker.one_step_s:
            return
        steps = min(int(passed_s / worker.one_step_s), worker.steps_left - 1)
        self._begun_s += steps * worker.one_step_s
        worker.skip(steps)

    def _schedule_end(self) -> None:
        self._version += 1
        version, worker = self._version, self.worker
        end_s = self._begun_s + worker.steps_left * worker.one_step_s
        self.clock.at(end_s, lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version == self._version and self.worker.plan is not None:
            self._send_all(self.worker.finish())
            self._between_steps()

    def _send_all(self, outbox: Outbox) -> None:
        for destination, command in outbox:
            self.send(self, destination, command)

    def _between_steps(self) -> None:
        worker = self.worker
        while worker.inbox:
            self._send_all(worker.handle(*worker.inbox.pop(0)))
        self.report(self)
        if worker.begin():
            self._begun_s = self.clock.now
            self._schedule_end()
        else:
            self.report(self)  # preemptions of the planning that left nothing to compute


class Transfers:
    """Block transfers between workers: they begin when send and receive are posted."""

    def __init__(
        self,
        clock: Clock,
        duration_s: Callable[[int], float],  # of so many blocks
        write: Callable[[int, Address, BlockResult], None],
    ):
        self._clock, self._duration_s, self._write = clock, duration_s, write
        self._sends: dict[tuple[int, int, int], SendBlocks] = {}  # (source, destination, tag)
        self._receives: dict[tuple[int, int, int], ReceiveBlocks | DrainBlocks] = {}

    def handle(self, worker: int, order: DataPlaneCommand) -> None:
        """Post a send or a receive of this worker."""
        match order:
            case SendBlocks(dst=dst, tag=tag):
                key = (worker, dst, tag)
                self._sends[key] = order
            case ReceiveBlocks(src=src, tag=tag) | DrainBlocks(src=src, tag=tag):
                key = (src, worker, tag)
                self._receives[key] = order
            case _:
                raise TypeError(order)
        if key in self._sends and key in self._receives:
            self._begin(key[0], key[1], self._sends.pop(key), self._receives.pop(key))

    def _begin(
        self, src: int, dst: int, send: SendBlocks, receive: ReceiveBlocks | DrainBlocks
    ) -> None:
        took_s = self._duration_s(len(send.block_ids))

        def end() -> None:
            self._write(src, DATA_PLANE, BlocksSent(send.request_id, send.epoch, send.tag))
            if isinstance(receive, ReceiveBlocks):
                arrived = BlocksArrived(
                    receive.request_id, receive.epoch, True, took_s, receive.tag, ""
                )
                self._write(dst, DATA_PLANE, arrived)

        self._clock.at(self._clock.now + took_s, end)
