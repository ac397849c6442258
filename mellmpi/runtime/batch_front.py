"""A batch job as rank 0's loop sees it: arrivals in, answers out."""

import random
from collections.abc import Callable, Iterator
from typing import Protocol

from mellmpi.protocol import Cancel, Emit, Rejected, Request, Submit

OPEN_REQUESTS = 1024  # submitted at once; the rest of the input stays unread
DRAWN_A_TURN = 32  # tokenizing takes time, and the loop has others to hear
PIPE_POLL_S = 0.02  # a pipe is looked at so often when nothing else happens
LONG_S = 1e6


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Arrival times in seconds, `rate` of them a second on average."""
    rng, now = random.Random(seed), 0.0
    while True:
        yield now
        now += rng.expovariate(rate)


class BatchJob(Protocol):
    """Where requests come from and answers go: `BatchJob` or `ReplayJob`."""

    @property
    def exhausted(self) -> bool: ...
    @property
    def done(self) -> bool: ...
    def requests(self) -> Iterator[Request]: ...
    def emit(self, event: Emit) -> tuple[int, ...]: ...
    def rejected(self, event: Rejected) -> tuple[int, ...]: ...


class BatchFront:
    """Submits what is due, cancels what nobody waits for, and passes answers to the job."""

    def __init__(
        self,
        job: BatchJob,
        arrivals: Iterator[float] | None,
        advanced: Callable[[int], None] = lambda _: None,
        max_open: float = OPEN_REQUESTS,
    ):
        self._job, self._arrivals, self._advanced = job, arrivals, advanced
        self._max_open = max_open
        self._start_s: float | None = None
        self._next_s = next(arrivals) if arrivals is not None else 0.0
        self._cancels: list[Cancel] = []
        self._open: set[int] = set()
        self._more = False  # the last turn stopped before it had drawn all that was due

    @property
    def done(self) -> bool:
        return self._job.done and not self._cancels

    def inbox(self, now: float) -> list[Submit | Cancel]:
        if self._start_s is None:
            self._start_s = now
        events: list[Submit | Cancel] = [*self._cancels]
        self._cancels = []
        self._more = False
        while self._may_submit(now):
            if len(events) >= DRAWN_A_TURN:
                self._more = True
                break
            request = next(self._job.requests(), None)
            if request is None:
                break
            self._open.add(request.id)
            events.append(Submit(request))
            if self._arrivals is not None:
                self._next_s = next(self._arrivals)
        return events

    def _may_submit(self, now: float) -> bool:
        if self._job.exhausted or len(self._open) >= self._max_open:
            return False
        return now - (self._start_s or 0.0) >= self._next_s

    def due_s(self, now: float) -> float:
        if self._cancels or self._more:
            return 0.0
        if self._job.exhausted or len(self._open) >= self._max_open:
            return LONG_S
        left_s = (self._start_s or now) + self._next_s - now
        return left_s if left_s > 0 else PIPE_POLL_S

    def deliver(self, command: Emit | Rejected) -> None:
        if isinstance(command, Emit):
            self._advanced(len(command.tokens))
            unwanted, reason = self._job.emit(command), "stop"
            ended = command.finish_reason is not None
        else:
            unwanted, reason, ended = self._job.rejected(command), "gone", True
        if ended:
            self._open.discard(command.request_id)
        self._open.difference_update(unwanted)
        self._cancels += [Cancel(request_id, reason) for request_id in unwanted]
