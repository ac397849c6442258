"""Rank 0: the loop around the cluster scheduler. Events in, commands out, no opinions."""

import logging
from collections.abc import Callable
from typing import Any, Protocol

from mellmpi.protocol import FRONT, OBSERVER, Address, RankFailed, Stop
from mellmpi.scheduler import ClusterScheduler, WorkerState
from mellmpi.telemetry import Metrics
from mellmpi.transport import Transport

log = logging.getLogger(__name__)
AT_REST_S = 1.0  # longest sleep where the policy has nothing to look at


class Front(Protocol):
    """Where requests come from and answers go."""

    @property
    def done(self) -> bool:
        """No request is open, and none will come."""
        ...

    def inbox(self, now: float) -> list[Any]:
        """Submit and Cancel events that are due by now."""
        ...

    def due_s(self, now: float) -> float:
        """Seconds until the inbox may have something by itself; large when only answers can."""
        ...

    def deliver(self, command: Any) -> None:
        """An Emit or Rejected."""
        ...


class SchedulerLoop:
    """One turn at a time, so that a worker can share the process."""

    def __init__(
        self,
        transport: Transport,
        scheduler: ClusterScheduler,
        metrics: Metrics,
        clock: Callable[[], float],
    ):
        self._transport, self._scheduler = transport, scheduler
        self._metrics, self._clock = metrics, clock

    def turn(self, front: Front | None) -> bool:
        """Everything that has come by now. False: there was nothing."""
        now = self._clock()
        events: list[tuple[Address, Any]] = list(self._transport.poll())
        if front is not None:
            events += [(FRONT, event) for event in front.inbox(now)]
        for source, event in events:
            if isinstance(event, RankFailed):
                log.error(
                    "the job goes on without worker %s, which has failed:\n%s", source, event.text
                )
                continue
            now = self._clock()
            self._metrics.observe(now, source, event)
            self._carry_out(self._scheduler.handle(source, event, now), now, front)
        self._carry_out(self._scheduler.tick(now), now, front)
        return bool(events)

    def _carry_out(
        self, commands: list[tuple[Address, Any]], now: float, front: Front | None
    ) -> None:
        self._metrics.commands(now, commands)
        for destination, command in commands:
            if destination == FRONT:
                assert front is not None, "an answer to nobody's request"
                front.deliver(command)
            elif destination != OBSERVER:
                self._transport.send(int(destination), command)

    def wait(self, front: Front | None) -> None:
        """Sleep until something may have come, or the next look of the policy is due."""
        at_rest = self._scheduler.at_rest(self._clock())
        longest_s = AT_REST_S if at_rest else self._scheduler.config.rebalance_every_s
        if front is not None:
            longest_s = min(longest_s, front.due_s(self._clock()))
        self._transport.wait(longest_s)

    def starting(self) -> int:
        """Workers that have not said that they are ready, and are not lost."""
        return len(self._scheduler.registry.ledger.workers(WorkerState.STARTING))

    def all_lost(self) -> bool:
        """Nobody is left to serve anything."""
        states = self._scheduler.registry.ledger.state[1:]
        return bool((states == WorkerState.LOST).all())

    def stop(self) -> None:
        """Send every worker home."""
        for worker in range(1, self._transport.num_workers + 1):
            self._transport.send(worker, Stop())
