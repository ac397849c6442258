"""When the steps of simulated workers begin and end, and their blocks arrive."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from mellmpi.protocol import (
    DATA_PLANE,
    Address,
    BlocksArrived,
    BlocksSent,
    DrainBlocks,
    ReceiveBlocks,
    SendBlocks,
)
from mellmpi.sim.fast import FastWorker

EDGE = 1e-9  # seconds: a step that ends now has ended


@dataclass
class Clock:
    """What is to happen, in the order of time; of what happens at once, in the order of asking."""

    now: float = 0.0
    _heap: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: Any = field(default_factory=count)

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (time_s, next(self._order), action))

    def next(self) -> bool:
        """Let the next thing happen; False: there is none."""
        if not self._heap:
            return False
        self.now, _, action = heapq.heappop(self._heap)
        action()
        return True


@dataclass(eq=False)
class Pace:
    """A worker in time: messages wait for the end of the step under way."""

    worker: FastWorker
    clock: Clock
    carry: Callable[["Pace", Address, Any], None]  # what the worker sends, and to whom
    report: Callable[["Pace"], None]  # all messages are read, or a step is over
    _begun_s: float = 0.0  # of the first step that has not been taken in
    _version: int = 0  # of the end on the clock

    def write(self, source: Address, message: Any) -> None:
        """A message has come; the worker reads it when no step is under way."""
        self.worker.inbox.append((source, message))
        if self.worker.plan is None:
            return self._turn()
        self.settle()
        self.worker.steps_left = 1
        self._await_end()

    def settle(self) -> None:
        """Take in the steps that are over, but the last like them: that is an event."""
        worker, passed_s = self.worker, self.clock.now - self._begun_s + EDGE
        if worker.plan is None or worker.steps_left == 1 or passed_s < worker.one_step_s:
            return
        steps = min(int(passed_s / worker.one_step_s), worker.steps_left - 1)
        self._begun_s += steps * worker.one_step_s
        worker.skip(steps)

    def _await_end(self) -> None:
        self._version += 1
        version, worker = self._version, self.worker
        end_s = self._begun_s + worker.steps_left * worker.one_step_s
        self.clock.at(end_s, lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version == self._version and self.worker.plan is not None:
            self._carry(self.worker.finish())
            self._turn()

    def _carry(self, commands: list[tuple[Address, Any]]) -> None:
        for destination, command in commands:
            self.carry(self, destination, command)

    def _turn(self) -> None:
        worker = self.worker
        while worker.inbox:
            self._carry(worker.handle(*worker.inbox.pop(0)))
        self.report(self)
        if worker.begin():
            self._begun_s = self.clock.now
            self._await_end()
        else:
            self.report(self)  # who was preempted though nobody was left to step


class Transfers:
    """Blocks between workers: what is sent and what is awaited meet, and take their time."""

    def __init__(
        self,
        clock: Clock,
        took_s: Callable[[int], float],
        write: Callable[[int, Address, Any], None],
    ):
        self._clock, self._took_s, self._write = clock, took_s, write  # blocks -> seconds
        self._sends: dict[tuple[int, int, int], SendBlocks] = {}  # (source, destination, tag)
        self._receives: dict[tuple[int, int, int], ReceiveBlocks | DrainBlocks] = {}

    def handle(self, worker: int, order: Any) -> None:
        """One order of a worker's batch scheduler."""
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
        took_s = self._took_s(len(send.block_ids))

        def over() -> None:
            self._write(src, DATA_PLANE, BlocksSent(send.request_id, send.epoch, send.tag))
            if isinstance(receive, ReceiveBlocks):
                self._write(
                    dst,
                    DATA_PLANE,
                    BlocksArrived(
                        receive.request_id,
                        receive.epoch,
                        True,
                        took_s,
                        receive.tag,
                        "",
                    ),
                )

        self._clock.at(self._clock.now + took_s, over)
