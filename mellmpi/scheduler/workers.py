"""The workers as rank 0 manages them: states, ownership of requests, commands, measured rates."""

from dataclasses import replace
from itertools import count

import numpy as np

from mellmpi.config import ClusterConfig
from mellmpi.costs import Estimates, StepBudget
from mellmpi.protocol import (
    OBSERVER,
    Address,
    ModelKv,
    Park,
    SchedulerCommand,
    StepReport,
    Wake,
    WorkerChanged,
    WorkerCommand,
    WorkerReady,
)
from mellmpi.scheduler.admission import Admission
from mellmpi.scheduler.growth_rates import GrowthRates
from mellmpi.scheduler.ledger import ACTIVE, LOST, WITHOUT_ARENA, Ledger, WorkerState
from mellmpi.scheduler.planner import InFlight
from mellmpi.scheduler.prompts import QueuedPrompts
from mellmpi.scheduler.release import freed_in
from mellmpi.scheduler.requests import Record
from mellmpi.scheduler.view import (
    Drain,
    ParkWorker,
    Proposal,
    RequestColumns,
    View,
    WakeWorker,
)

Commands = list[tuple[Address, SchedulerCommand]]
ANSWER_TOKENS = 128.0  # assumed output length before any request has finished
HELD_NAMES = {WorkerState.HELD: "draining", WorkerState.HELD_PARKED: "parked"}
LENGTH_BLEND = 0.05  # weight of the newest output length
FIT_EVERY_S = 0.5  # step reports are fitted in batches: a batch costs little more than one report


class WorkerRegistry:
    """All workers. Commands collect in `out` until the cluster scheduler returns them."""

    def __init__(self, num_workers: int, config: ClusterConfig):
        self.ledger = Ledger(num_workers)
        self.models: dict[str, ModelKv] = {}
        self.admission = Admission(self.ledger, self.models)
        self.arithmetic: dict[int, str] = {}  # of workers that have been ready
        self.out: Commands = []
        self.in_flight = InFlight()
        self.changed_s = np.zeros(num_workers + 1)  # when each worker entered its state
        self.prompts = QueuedPrompts()
        self._estimates: Estimates | None = None
        self._fit_s = 0.0  # time of the next fit of step reports
        self._epochs = count(1)
        self._has_woken = False  # a worker has been woken in this job
        self.view = View(
            now=0.0,
            workers=self.ledger,
            requests=RequestColumns(),
            waiting_bytes=0,
            growth_Bps=np.zeros(num_workers + 1),
            token_rate=0.0,
            answer_tokens=ANSWER_TOKENS,
            park_after_s=config.park_after_s,
            seed=config.seed,
            tick=0,
            period_s=config.rebalance_every_s,
            thrift=config.thrift,
        )
        self.rates = GrowthRates(self.view)

    @property
    def estimates(self) -> Estimates:
        """Estimates from measurements; their prior is the cost model of the view."""
        if self._estimates is None:
            self._estimates = Estimates(self.view.cost)
        return self._estimates

    def take(self) -> Commands:
        """Return the commands collected since the last call."""
        commands, self.out = self.out, []
        return commands

    def send(self, worker: int, command: WorkerCommand, num_bytes: int = 0) -> None:
        """Send a command that will take `num_bytes` of the worker's arena; none to a lost one."""
        if self.ledger.state[worker] != LOST:
            self.ledger.order(worker, num_bytes)
            self.out.append((worker, command))

    def next_epoch(self) -> int:
        """Return an epoch that no assignment and no offer has used."""
        return next(self._epochs)

    # --- ownership ------------------------------------------------------------------------------

    def set_owner(self, record: Record, worker: int, epoch: int) -> None:
        """Make the worker, whose `num_requests` already counts the request, its owner."""
        queued_tokens = record.queued_tokens  # of a prompt that moves before it is computed
        self.end_prefill(record)
        record.worker, record.epoch = worker, epoch
        record.num_placed, record.transfer_failed = len(record.log.tokens), False
        requests = self.view.requests
        self._count_size_class(record.slot, worker)
        requests.worker[record.slot] = worker
        requests.movable[record.slot] = True
        if record.plan is None:  # prefills of migrations are counted in `in_flight`
            queued_tokens = record.num_tokens
        record.queued_tokens = queued_tokens
        self.prompts.add(worker, queued_tokens)

    def end_prefill(self, record: Record) -> None:
        """Remove the request from its owner's queued tokens: it decodes, or leaves the owner."""
        if record.queued_tokens and record.worker is not None:
            self.prompts.end(record.worker, record.queued_tokens)
            record.queued_tokens = 0

    def clear_owner(self, record: Record) -> None:
        """Take the request from its owner, if it has one."""
        self.end_prefill(record)
        if record.worker is not None:
            self.ledger.remove(record.worker, self.view.now)
        record.worker = record.epoch = None
        requests = self.view.requests
        self._count_size_class(record.slot, 0)
        requests.worker[record.slot], requests.movable[record.slot] = 0, False

    def _count_size_class(self, row: int, worker: int) -> None:
        """Update the size class counts, if the policy uses them, for a change to this worker."""
        if (size_classes := self.view.size_classes) is not None:
            requests = self.view.requests
            size_classes.enter(
                row, requests.need(row), int(requests.worker[row]), worker, self.ledger
            )

    def pin(self, record: Record, worker: int) -> None:
        """Let the request resume only on this worker, which takes no others before; 0: on any."""
        pinned_to = self.view.requests.pinned_to
        if pinned_to[record.slot]:
            self.ledger.add_returning(int(pinned_to[record.slot]), -1)
        pinned_to[record.slot] = worker
        if worker:
            self.ledger.add_returning(worker, 1)

    # --- states ---------------------------------------------------------------------------------

    def ready(self, worker: int, event: WorkerReady) -> None:
        self._learn_wake(event.wake_s, bool(self.ledger.state[worker] == WorkerState.WAKING))
        self.ledger.ready(
            worker, event.models, event.capacity_bytes, event.max_num_seqs, event.acked
        )
        if self.ledger.held[worker]:
            self.ledger.enter(worker, WorkerState.HELD)
        self.ledger.empty_since_s[worker] = self.view.now
        self.models |= {m.model: m for m in event.models}
        self.arithmetic[worker] = event.arithmetic
        budget = StepBudget(event.max_batched_tokens, event.target_step_s)
        self.estimates.steps.begin(worker, budget, event.step_s)
        self._changed(worker)

    def _learn_wake(self, wake_s: float, woken: bool) -> None:
        """Update `wake_s`. Starts, which take a little longer, count until the first wake."""
        cost = self.view.cost
        if woken and not self._has_woken:
            self._has_woken, self.view.cost = True, replace(cost, wake_s=wake_s)
        elif woken or not self._has_woken:
            self.view.cost = cost.after_wake(wake_s)

    def change(self, worker: int, state: WorkerState) -> None:
        self.ledger.enter(worker, state)
        self._changed(worker)

    def _changed(self, worker: int) -> None:
        self.changed_s[worker] = self.view.now
        self.admission.worker_changed()
        state = WorkerState(int(self.ledger.state[worker]))
        name = HELD_NAMES.get(state) or state.name.lower()
        self.out.append((OBSERVER, WorkerChanged(worker, name)))

    def apply(self, proposal: Proposal) -> None:
        """Drain, park or wake a worker; a proposal about a request changes nothing."""
        match proposal:
            case Drain(worker):
                self.drain(worker)
            case ParkWorker(worker):
                self.park(worker)
            case WakeWorker(worker):
                self.wake(worker)

    def drain(self, worker: int) -> None:
        """Stop placing requests on an active worker; it parks once it is empty.

        The last active worker of a model in use stays active: its requests could not move away.
        """
        if self.ledger.state[worker] == ACTIVE and not self._is_last(worker):
            self.change(worker, WorkerState.DRAINING)

    def park(self, worker: int) -> None:
        """Make an active, draining or held worker release its arena, if it holds no request."""
        held = self.ledger.state[worker] == WorkerState.HELD
        used = self.ledger.num_requests[worker] or (not held and self._is_last(worker))
        loaded = self.ledger.state[worker] in (WorkerState.ACTIVE, WorkerState.DRAINING)
        if not used and (held or loaded):
            self.send(worker, Park())
            self.change(worker, WorkerState.PARKING)

    def hold(self, worker: int) -> None:
        """Keep requests away from a worker, in whatever state, until `unhold`."""
        self.ledger.held[worker] = True
        if self.ledger.state[worker] in (WorkerState.ACTIVE, WorkerState.DRAINING):
            self.change(worker, WorkerState.HELD)
        elif self.ledger.state[worker] == WorkerState.PARKED:
            self.change(worker, WorkerState.HELD_PARKED)

    def unhold(self, worker: int) -> None:
        """Let a held worker take requests again; a parked one once a policy wakes it."""
        self.ledger.held[worker] = False
        if self.ledger.state[worker] == WorkerState.HELD:
            self.change(worker, WorkerState.ACTIVE)
        elif self.ledger.state[worker] == WorkerState.HELD_PARKED:
            self.change(worker, WorkerState.PARKED)

    def _is_last(self, worker: int) -> bool:
        """True if it is the last active worker of a model that a live request uses."""
        ledger, requests = self.ledger, self.view.requests
        used = np.bincount(requests.model[requests.live], minlength=len(ledger.models)) > 0
        active = ledger.state == WorkerState.ACTIVE
        active[worker] = False
        served = (ledger.runs & active).any(axis=1)
        return bool((used & ledger.runs[:, worker] & ~served).any())

    def parked(self, worker: int) -> None:
        held = self.ledger.held[worker]
        self.ledger.drop_arena(worker, WorkerState.HELD_PARKED if held else WorkerState.PARKED)
        self._changed(worker)

    def wake(self, worker: int) -> None:
        """Make a parked worker load again, or a draining worker active."""
        if self.ledger.state[worker] == WorkerState.PARKED:
            self.send(worker, Wake())
            self.change(worker, WorkerState.WAKING)
        elif self.ledger.state[worker] == WorkerState.DRAINING:
            self.change(worker, WorkerState.ACTIVE)

    def lost(self, worker: int) -> None:
        self.ledger.held[worker] = False
        self.ledger.drop_arena(worker, WorkerState.LOST)
        self._changed(worker)

    def undrain(self, model: str) -> bool:
        """Make draining workers of this model active again; return True if there was one."""
        able = self.ledger.able(model)
        draining = [w for w in self.ledger.workers(WorkerState.DRAINING) if able[w]]
        for worker in draining:
            self.change(worker, WorkerState.ACTIVE)
        return bool(draining)

    def wake_for(self, model: str, waiting_bytes: int, waited_s: float) -> None:
        """Wake a parked worker, unless the queue is expected to find room before it is awake.

        Expected room: the arenas of workers that are waking, and the bytes that finishing requests
        free. The latter, a guess, only count while the queue has waited for less than `wake_s`.
        """
        ledger, able, wake_s = self.ledger, self.ledger.able(model), self.view.cost.wake_s
        parked = np.flatnonzero(able & (ledger.state == WorkerState.PARKED))
        waking = able & (ledger.state == WorkerState.WAKING) & ~ledger.held
        lacking = waiting_bytes - ledger.capacity[waking].sum()
        if not len(parked) or lacking <= 0:
            return
        if waited_s >= wake_s or lacking > freed_in(self.view, wake_s, able):
            self.wake(int(parked[0]))

    # --- rates ----------------------------------------------------------------------------------

    def finished(self, num_outputs: int) -> None:
        """Learn output lengths from a finished request (both in tokens)."""
        self.view.lengths.add(num_outputs)
        self.view.answer_tokens += LENGTH_BLEND * (num_outputs - self.view.answer_tokens)

    def report(self, worker: int, event: StepReport) -> None:
        if int(self.ledger.state[worker]) in WITHOUT_ARENA:
            return  # sent before it parked: its arena is released
        self.ledger.report(worker, event.acked, event.free_bytes)
        self.estimates.steps.add(worker, event)
        if event.prefill_tokens:
            self.prompts.computed(worker, event.prefill_tokens)
        self.rates.decoded[worker] += event.decode_tokens

    def tick(self, now: float) -> None:
        """Update rates and costs from the reports since the last tick."""
        self.estimates.forget_stale(now)
        if now >= self._fit_s and self.estimates.steps.fold():
            self._fit_s = now + FIT_EVERY_S
            self.view.cost = self.view.cost.with_steps(self.estimates.steps.coefficients())
        self.rates.tick(now)
        self.view.tick += 1
