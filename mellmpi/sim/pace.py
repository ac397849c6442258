"""When the steps of one simulated worker begin and end."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from mellmpi.sim.counted import Sending
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
    carry: Callable[["Pace", Any], None]  # an answer of the worker, or a `Sending`
    turned: Callable[["Pace"], None]  # all messages read: time to report
    _begun_s: float = 0.0  # the step under way, or the first that has not been taken in
    _inbox: list[Callable[[], list[Any]]] = field(default_factory=list)
    _version: int = 0  # of the end on the clock

    def write(self, read: Callable[[], list[Any]]) -> None:
        """A message has come; `read` hands it to the worker when no step is under way."""
        self._inbox.append(read)
        if self.worker.stretch is None:
            return self._turn()
        self.settle()
        self.worker.cut()
        self._await_end()

    def settle(self) -> None:
        """Take in the steps that are over, but the last of its stretch: that is an event."""
        stretch, passed_s = self.worker.stretch, self.clock.now - self._begun_s + EDGE
        if stretch is None or passed_s < stretch.step_s:
            return
        steps = min(int(passed_s / stretch.step_s), stretch.steps - 1)
        if steps:
            self._begun_s += steps * stretch.step_s
            self.worker.advance(steps)

    def _await_end(self) -> None:
        stretch = self.worker.stretch
        assert stretch is not None
        self._version += 1
        version, end_s = self._version, self._begun_s + stretch.steps * stretch.step_s
        self.clock.at(end_s, lambda: self._end(version))

    def _end(self, version: int) -> None:
        if version == self._version and self.worker.stretch is not None:
            self.worker.advance(self.worker.stretch.steps)
            self._turn()

    def _turn(self) -> None:
        inbox, self._inbox = self._inbox, []
        for read in inbox:
            for answer in read():
                self.carry(self, answer)
        self.turned(self)
        if self.worker.plan() is not None:
            self._begun_s = self.clock.now
            self._await_end()
        elif self.worker.preempted:  # by a step that nobody was left for
            self.turned(self)


def transfer(clock: Clock, sending: Sending, source: Pace, destination: Pace) -> None:
    """The KV is on its way: the header first, then all else in the time that it takes."""
    src, dst = source.worker, destination.worker
    took_s = max(src.cost.transfer_s(sending.num_bytes), src.cost.recompute_s(sending.start))

    def sent() -> None:
        if sending.num_bytes:
            source.write(lambda: src.sent(sending.epoch))

    def over() -> None:
        sent()
        destination.write(lambda: dst.arrived(sending, took_s))

    def header() -> list[Any]:
        wanted = sending.dst_epoch in dst.sequences  # or released before it came
        if wanted and dst.expects(sending):
            if not sending.num_bytes:  # stopped before its first step: nothing to wait for
                return dst.arrived(sending, 0.0)
            clock.at(clock.now + took_s, over)
            return []
        clock.at(clock.now + took_s, sent)  # taken off the wire, and thrown away
        return [dst.failed(sending)] if wanted else []

    destination.write(header)
