"""The `Front` of a batch: submits requests at their arrival times, and passes answers on."""

import random
from collections.abc import Callable, Iterator
from typing import Protocol

from mellmpi.frontend import Counts
from mellmpi.protocol import Cancel, Emit, FrontEvent, OperatorAnswer, Rejected, Request, Submit

OPEN_REQUESTS = 1024  # maximum of submitted requests; the rest of the input stays unread
SUBMITS_PER_INBOX = 32  # tokenizing takes time, and other events wait for it
PIPE_POLL_S = 0.02  # poll interval of a pipe while there are no other events
LONG_S = 1e6


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Yield arrival times in seconds of a Poisson process with `rate` arrivals per second."""
    rng, now = random.Random(seed), 0.0
    while True:
        yield now
        now += rng.expovariate(rate)


class RequestSource(Protocol):
    """A source of requests that takes their answers: `BatchJob` or `ReplayJob`.

    `emit` and `rejected` return ids of requests to cancel.
    """

    counts: Counts

    @property
    def exhausted(self) -> bool: ...
    @property
    def done(self) -> bool: ...
    def requests(self) -> Iterator[Request]: ...
    def emit(self, event: Emit) -> tuple[int, ...]: ...
    def rejected(self, event: Rejected) -> tuple[int, ...]: ...


class BatchFront:
    """Submits requests that are due, and passes answers to the source; cancels requests for it."""

    def __init__(
        self,
        source: RequestSource,
        arrivals: Iterator[float] | None,
        on_tokens: Callable[[int], None] = lambda _: None,
        max_open: float = OPEN_REQUESTS,
    ):
        self._source, self._arrivals, self._on_tokens = source, arrivals, on_tokens
        self._max_open = max_open
        self._start_s: float | None = None
        self._next_s = next(arrivals) if arrivals is not None else 0.0
        self._cancels: list[Cancel] = []
        self._open: set[int] = set()
        self._has_due = False  # the last `inbox` left requests that are due

    descriptors = ()  # of pipes: they are polled

    @property
    def done(self) -> bool:
        return self._source.done and not self._cancels

    def flush(self) -> None:
        """Do nothing: answers are written as they are delivered."""

    def inbox(self, now: float) -> list[Submit | Cancel]:
        if self._start_s is None:
            self._start_s = now
        events: list[Submit | Cancel] = [*self._cancels]
        self._cancels = []
        self._has_due = False
        while self._may_submit(now):
            if len(events) >= SUBMITS_PER_INBOX:
                self._has_due = True
                break
            request = next(self._source.requests(), None)
            if request is None:
                break
            self._open.add(request.id)
            events.append(Submit(request))
            if self._arrivals is not None:
                self._next_s = next(self._arrivals)
        return events

    def _may_submit(self, now: float) -> bool:
        if self._source.exhausted or len(self._open) >= self._max_open:
            return False
        return now - (self._start_s or 0.0) >= self._next_s

    def due_s(self, now: float) -> float:
        if self._cancels or self._has_due:
            return 0.0
        if self._source.exhausted or len(self._open) >= self._max_open:
            return LONG_S
        left_s = (self._start_s or now) + self._next_s - now
        return left_s if left_s > 0 else PIPE_POLL_S

    def deliver(self, command: FrontEvent) -> None:
        assert not isinstance(command, OperatorAnswer), "a batch has no operator"
        if isinstance(command, Emit):
            self._on_tokens(len(command.tokens))
            unwanted, reason = self._source.emit(command), "stop"
            ended = command.finish_reason is not None
        else:
            unwanted, reason, ended = self._source.rejected(command), "gone", True
        if ended:
            self._open.discard(command.request_id)
        self._open.difference_update(unwanted)
        self._cancels += [Cancel(request_id, reason) for request_id in unwanted]
