"""The cluster on simulated time: the same two machines, a heap for a clock, links with delays."""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from mellmpi.config import ClusterConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import (
    DATA_PLANE,
    FRONT,
    OBSERVER,
    SCHEDULER,
    Address,
    Cancel,
    Emit,
    Rejected,
    Request,
    Submit,
    TokenLogprob,
    Wake,
    WorkerLost,
)
from mellmpi.scheduler import ClusterScheduler
from mellmpi.scheduler.policies import policy_for
from mellmpi.sim.data_plane import DataPlane
from mellmpi.sim.network import Network
from mellmpi.sim.worker import SimWorker, WorkerSpec


@dataclass
class Outcome:
    """What the clients saw, and what the observer was told."""

    outputs: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    finished: dict[int, str] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)
    observed: list[tuple[float, Any]] = field(default_factory=list)


class Simulation:
    """Build it, `submit`, `cancel` and `crash` at chosen times, then `run`."""

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        config: ClusterConfig,
        cost: CostModel,
        network: Network,
        rng: random.Random,
    ):
        self.config, self.cost, self.network, self.rng = config, cost, network, rng
        self.scheduler = ClusterScheduler(
            len(specs), config, policy_for(config.policy, config.migrate)
        )
        self.workers = {w: SimWorker(w, spec) for w, spec in enumerate(specs, start=1)}
        self.data_plane = DataPlane(self.workers, self._block_s, self.later, self._tell)
        self.outcome = Outcome()
        self.max_events = 200_000  # of one `run`: more is a livelock
        self.report_share = 0.5  # of the steps are followed by a report; it covers several then
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        for worker in self.workers.values():
            self.later(0.0, lambda w=worker: self._to_scheduler(w.id, w.wake()))
        self._live = 0  # submitted requests that are not over

    # --- what happens to the cluster ------------------------------------------------------------

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay_s, action)

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        # Absolute: now + (time - now) may round to before what was sent earlier on the same link.
        heapq.heappush(self._heap, (time_s, next(self._order), action))

    def submit(self, at_s: float, request: Request) -> None:
        self._live += 1
        self.at(at_s, lambda: self._to_scheduler(FRONT, Submit(request)))

    def cancel(self, at_s: float, request_id: int) -> None:
        """The client goes away; a request that has ended by then is not touched."""

        def cancel() -> None:
            over = self.outcome.finished.keys() | self.outcome.rejected.keys()
            if request_id in self.scheduler.records and request_id not in over:
                self.outcome.finished[request_id] = "cancelled"
                self._live -= 1
                self._to_scheduler(FRONT, Cancel(request_id, "gone"))

        self.at(at_s, cancel)

    def crash(self, at_s: float, worker: int) -> None:
        """The worker dies; the scheduler hears of it a little later, and nothing else after."""
        self.at(at_s, lambda: self._crash(self.workers[worker]))

    def _crash(self, worker: SimWorker) -> None:
        worker.alive = False
        self.data_plane.lost(worker.id)
        at = self.network.arrival(worker.id, SCHEDULER, self.now)
        lost = WorkerLost(worker.id)
        self.at(at, lambda: self._to_scheduler(worker.id, lost))

    def run(self) -> Outcome:
        """Until every request is over and every link is empty."""
        self.later(0.0, self._tick)
        for _ in range(self.max_events):
            if not self._heap:
                return self.outcome
            self.now, _, action = heapq.heappop(self._heap)
            action()
        stuck = [r.bug("never ends") for r in self.scheduler.records.values()]
        raise RuntimeError(f"{self.max_events} events and no end: {stuck}")

    def run_until(self, end_s: float) -> Outcome:
        """Only up to this time, whatever is still under way."""
        self.later(0.0, self._tick)
        while self._heap and self._heap[0][0] <= end_s:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        return self.outcome

    # --- the loops ------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._route(SCHEDULER, self.scheduler.tick(self.now))
        if self._live > 0:
            self.later(self.config.rebalance_every_s, self._tick)

    def _to_scheduler(self, source: Address, event: Any) -> None:
        self._route(SCHEDULER, self.scheduler.handle(source, event, self.now))

    def _route(self, source: Address, commands: list[tuple[Address, Any]]) -> None:
        for destination, command in commands:
            if destination == FRONT:
                self._front(command)
            elif destination == OBSERVER:
                self.outcome.observed.append((self.now, command))
            elif destination == DATA_PLANE:
                self.data_plane.handle(self.workers[int(source)], command, self.now)
            else:
                self._post(source, int(destination), command)

    def _post(self, source: Address, destination: int, message: Any) -> None:
        at = self.network.arrival(source, destination, self.now)
        if destination == SCHEDULER:
            self.at(at, lambda: self._to_scheduler(source, message))
        else:
            self.at(at, lambda: self._to_worker(self.workers[destination], source, message))

    def _front(self, command: Any) -> None:
        match command:
            case Emit(request_id, first, tokens, logprobs, reason):
                outputs = self.outcome.outputs.setdefault(request_id, [])
                assert first == len(outputs), f"request {request_id}: token lost or repeated"
                outputs += tokens
                self.outcome.logprobs.setdefault(request_id, []).extend(logprobs)
                if reason:
                    self.outcome.finished[request_id] = reason
                    self._live -= 1
            case Rejected(request_id, reason):
                self.outcome.rejected[request_id] = reason
                self._live -= 1

    def _tell(self, worker: SimWorker, event: Any) -> None:
        self.later(self._block_s(), lambda: self._to_worker(worker, DATA_PLANE, event))

    def _to_worker(self, worker: SimWorker, source: Address, message: Any) -> None:
        if worker.alive:
            worker.inbox.append((source, message))
            if worker.plan is None:
                self._turn(worker)

    def _turn(self, worker: SimWorker) -> None:
        """Between two steps: messages in, commands out, the next step begun."""
        while worker.inbox:
            source, message = worker.inbox.pop(0)
            self._route(worker.id, worker.handle(source, message))
            if isinstance(message, Wake):
                self.later(worker.spec.wake_s, lambda: self._awake(worker))
        worker.plan = worker.batch.plan()
        if worker.plan is None or self.rng.random() < self.report_share:
            self._report(worker)
        if worker.plan is not None:
            sampled = sum(c.sampling is not None for c in worker.plan.chunks)
            positions = sum(len(c.tokens) for c in worker.plan.chunks)
            step_s = self.cost.forward_s(positions - sampled, sampled)
            self.later(step_s, lambda: self._step_done(worker, step_s))

    def _step_done(self, worker: SimWorker, step_s: float) -> None:
        if worker.alive:
            self._route(worker.id, worker.finish_step(step_s))
            self._turn(worker)

    def _report(self, worker: SimWorker) -> None:
        if (report := worker.report()) is not None:
            self._post(worker.id, SCHEDULER, report)

    def _awake(self, worker: SimWorker) -> None:
        if worker.alive:
            self._post(worker.id, SCHEDULER, worker.wake())

    def _block_s(self) -> float:
        return self.rng.expovariate(1.0) * self.cost.link_latency_s
