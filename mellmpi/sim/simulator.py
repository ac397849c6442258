"""A cluster on simulated time: real scheduler and batch schedulers, links with random delays."""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from mellmpi.config import ClusterConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import (
    DATA_PLANE,
    FRONT,
    SCHEDULER,
    Address,
    Cancel,
    DataPlaneCommand,
    Emit,
    FrontEvent,
    Observation,
    OperatorAnswer,
    OperatorCommand,
    PromptLogprob,
    Rejected,
    Request,
    SchedulerCommand,
    SchedulerEvent,
    Submit,
    TokenLogprob,
    Wake,
    WorkerEvent,
    WorkerLost,
)
from mellmpi.scheduler import ClusterScheduler
from mellmpi.scheduler.policies import policy_for
from mellmpi.sim.data_plane import DataPlane
from mellmpi.sim.network import Network
from mellmpi.sim.worker import SimWorker, WorkerSpec
from mellmpi.worker import BatchCommand, BlockResult


@dataclass
class Outcome:
    """What the clients and the observer received."""

    outputs: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[PromptLogprob]] = field(default_factory=dict)
    finished: dict[int, str] = field(default_factory=dict)  # request -> reason
    rejected: dict[int, str] = field(default_factory=dict)  # request -> reason
    answers: list[OperatorAnswer] = field(default_factory=list)
    observed: list[tuple[float, Observation]] = field(default_factory=list)  # with its time


class Simulation:
    """Build it, call `submit`, `cancel`, `operate` and `crash` with times in seconds; then `run`.

    `operate` gives an operator's command.
    """

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
        self.data_plane = DataPlane(self.workers, self._block_s, self.later, self._block_result)
        self.outcome = Outcome()
        self.max_events = 200_000  # per `run`: more is a livelock
        self.report_share = 0.5  # of the steps are followed by a report, which covers several
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        for worker in self.workers.values():
            self.later(0.0, partial(self._start, worker))
        self._live = 0  # submitted requests that have not ended

    # --- events from outside --------------------------------------------------------------------

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay_s, action)

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        # Absolute: now + (time - now) may round to before an earlier message of the same link.
        heapq.heappush(self._heap, (time_s, next(self._order), action))

    def submit(self, at_s: float, request: Request) -> None:
        self._live += 1
        self.at(at_s, lambda: self._to_scheduler(FRONT, Submit(request)))

    def cancel(self, at_s: float, request_id: int) -> None:
        """The client disconnects; no effect if the request has ended by then."""

        def cancel() -> None:
            over = self.outcome.finished.keys() | self.outcome.rejected.keys()
            if request_id in self.scheduler.records and request_id not in over:
                self.outcome.finished[request_id] = "cancelled"
                self._live -= 1
                self._to_scheduler(FRONT, Cancel(request_id, "gone"))

        self.at(at_s, cancel)

    def operate(self, at_s: float, command: OperatorCommand) -> None:
        """An operator gives a command; its answer goes to `Outcome.answers`."""
        self.at(at_s, lambda: self._to_scheduler(FRONT, command))

    def crash(self, at_s: float, worker: int) -> None:
        """The worker dies; `WorkerLost` is the last message of its link to the scheduler."""
        self.at(at_s, lambda: self._crash(self.workers[worker]))

    def _crash(self, worker: SimWorker) -> None:
        worker.alive = False
        self.data_plane.worker_lost(worker.id)
        at = self.network.arrival(worker.id, SCHEDULER, self.now)
        lost = WorkerLost(worker.id)
        self.at(at, lambda: self._to_scheduler(worker.id, lost))

    def run(self) -> Outcome:
        """Run until all requests have ended and all links are empty.

        RuntimeError after `max_events` events.
        """
        self.later(0.0, self._tick)
        for _ in range(self.max_events):
            if not self._heap:
                return self.outcome
            self.now, _, action = heapq.heappop(self._heap)
            action()
        stuck = [r.bug("never ends") for r in self.scheduler.records.values()]
        raise RuntimeError(f"{self.max_events} events and no end: {stuck}")

    def run_until(self, end_s: float) -> Outcome:
        """Run up to this time, even if requests are still in progress."""
        self.later(0.0, self._tick)
        while self._heap and self._heap[0][0] <= end_s:
            self.now, _, action = heapq.heappop(self._heap)
            action()
        return self.outcome

    # --- messages -------------------------------------------------------------------------------

    def _tick(self) -> None:
        self._route(SCHEDULER, self.scheduler.tick(self.now))
        if self._live > 0:
            self.later(self.config.rebalance_every_s, self._tick)

    def _to_scheduler(self, source: Address, event: SchedulerEvent) -> None:
        self._route(SCHEDULER, self.scheduler.handle(source, event, self.now))

    def _route(
        self, source: Address, commands: Sequence[tuple[Address, SchedulerCommand | BatchCommand]]
    ) -> None:
        for destination, command in commands:
            if isinstance(command, FrontEvent):
                self._front(command)
            elif isinstance(command, Observation):
                self.outcome.observed.append((self.now, command))
            elif isinstance(command, DataPlaneCommand):
                self.data_plane.handle(self.workers[int(source)], command, self.now)
            else:
                self._post(source, int(destination), command)

    def _post(
        self, source: Address, destination: int, message: SchedulerEvent | WorkerEvent
    ) -> None:
        at = self.network.arrival(source, destination, self.now)
        if isinstance(message, SchedulerEvent):
            self.at(at, partial(self._to_scheduler, source, message))
        else:
            self.at(at, partial(self._to_worker, self.workers[destination], source, message))

    def _front(self, event: FrontEvent) -> None:
        match event:
            case Emit(request_id, first, tokens, logprobs, reason, prompt_logprobs):
                outputs = self.outcome.outputs.setdefault(request_id, [])
                assert first == len(outputs), f"request {request_id}: token lost or repeated"
                outputs += tokens
                self.outcome.logprobs.setdefault(request_id, []).extend(logprobs)
                self.outcome.prompt_logprobs.setdefault(request_id, []).extend(prompt_logprobs)
                if reason:
                    self.outcome.finished[request_id] = reason
                    self._live -= 1
            case Rejected(request_id, reason, _):
                self.outcome.rejected[request_id] = reason
                self._live -= 1
            case OperatorAnswer():
                self.outcome.answers.append(event)

    # --- workers --------------------------------------------------------------------------------

    def _start(self, worker: SimWorker) -> None:
        self._to_scheduler(worker.id, worker.wake())

    def _block_result(self, worker: SimWorker, event: BlockResult) -> None:
        self.later(self._block_s(), lambda: self._to_worker(worker, DATA_PLANE, event))

    def _to_worker(self, worker: SimWorker, source: Address, message: WorkerEvent) -> None:
        if worker.alive:
            worker.inbox.append((source, message))
            if worker.plan is None:
                self._between_steps(worker)

    def _between_steps(self, worker: SimWorker) -> None:
        """Handle the worker's inbox, send its messages, and begin its next step."""
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
            self._between_steps(worker)

    def _report(self, worker: SimWorker) -> None:
        if (report := worker.report()) is not None:
            self._post(worker.id, SCHEDULER, report)

    def _awake(self, worker: SimWorker) -> None:
        if worker.alive:
            self._post(worker.id, SCHEDULER, worker.wake())

    def _block_s(self) -> float:
        return self.rng.expovariate(1.0) * self.cost.link_latency_s
