"""The main loop of rank 0: passes events to the cluster scheduler, and its commands on."""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from mellmpi.protocol import (
    FRONT,
    OBSERVER,
    Address,
    Cancel,
    FrontEvent,
    OperatorCommand,
    RankFailed,
    SchedulerEvent,
    Stop,
    Submit,
)
from mellmpi.scheduler import ClusterScheduler, Commands, WorkerState
from mellmpi.telemetry import Observer
from mellmpi.transport import Transport

log = logging.getLogger(__name__)
AT_REST_S = 1.0  # longest sleep while the policy has nothing to do


class Front(Protocol):
    """Submits requests and takes their answers. Times are in seconds of the loop's clock."""

    @property
    def done(self) -> bool:
        """Whether no request is open and none will follow."""
        ...

    @property
    def descriptors(self) -> Sequence[int]:
        """File descriptors whose readability means that `inbox` has events."""
        ...

    def inbox(self, now: float) -> Sequence[Submit | Cancel | OperatorCommand]:
        """Return the events that are due by now."""
        ...

    def due_s(self, now: float) -> float:
        """Return seconds until `inbox` may have events; large if it needs an answer first."""
        ...

    def deliver(self, command: FrontEvent) -> None: ...

    def flush(self) -> None:
        """Called after the commands of an iteration have been delivered."""
        ...


class SchedulerLoop:
    """The loop body of rank 0: call `run_once`, and `wait` when it returns False.

    One iteration at a time, so that a worker can share the process.
    """

    def __init__(
        self,
        transport: Transport,
        scheduler: ClusterScheduler,
        observer: Observer,
        clock: Callable[[], float],
    ):
        self._transport, self._scheduler = transport, scheduler
        self._observer, self._clock = observer, clock

    def run_once(self, front: Front | None) -> bool:
        """Handle all events that have arrived. Returns whether there were any."""
        now = self._clock()
        events: list[tuple[Address, SchedulerEvent | RankFailed]] = list(self._transport.poll())
        if front is not None:
            events += [(FRONT, event) for event in front.inbox(now)]
        for source, event in events:
            if isinstance(event, RankFailed):
                log.error(
                    "the job continues without worker %s, which failed:\n%s", source, event.text
                )
                continue
            now = self._clock()
            self._observer.observe(now, source, event)
            self._execute(self._scheduler.handle(source, event, now), now, front)
        self._execute(self._scheduler.tick(now), now, front)
        if front is not None:
            front.flush()
        return bool(events)

    def _execute(self, commands: Commands, now: float, front: Front | None) -> None:
        self._observer.commands(now, commands)
        for destination, command in commands:
            if isinstance(command, FrontEvent):
                assert front is not None, f"{command} without a front"
                front.deliver(command)
            elif destination != OBSERVER:
                self._transport.send(int(destination), command)

    def wait(self, front: Front | None) -> None:
        """Sleep until there may be events, or the policy is due."""
        at_rest = self._scheduler.at_rest(self._clock())
        longest_s = AT_REST_S if at_rest else self._scheduler.config.rebalance_every_s
        if front is not None:
            longest_s = min(longest_s, front.due_s(self._clock()))
        self._transport.wait(longest_s, () if front is None else front.descriptors)

    def starting(self) -> int:
        """Return the number of workers that are neither ready nor lost."""
        return len(self._scheduler.registry.ledger.workers(WorkerState.STARTING))

    def all_lost(self) -> bool:
        """Return whether no worker is left."""
        states = self._scheduler.registry.ledger.state[1:]
        return bool((states == WorkerState.LOST).all())

    def stop(self) -> None:
        """Tell every worker to stop."""
        for worker in range(1, self._transport.num_workers + 1):
            self._transport.send(worker, Stop())
