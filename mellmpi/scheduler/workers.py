"""The workers' side of rank 0: their states, their budgets, what is on its way to them."""

from collections import Counter
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from mellmpi.config import ClusterConfig
from mellmpi.costs import Estimates, StepBudget
from mellmpi.protocol import (
    OBSERVER,
    Address,
    ModelKv,
    Park,
    Request,
    StepReport,
    Wake,
    WorkerChanged,
    WorkerReady,
    kv_need,
)
from mellmpi.scheduler.growth_rates import GrowthRates
from mellmpi.scheduler.ledger import ACTIVE, LOST, WITHOUT_ARENA, Ledger, WorkerState
from mellmpi.scheduler.planner import InFlight
from mellmpi.scheduler.requests import Record
from mellmpi.scheduler.view import (
    Drain,
    ParkWorker,
    Proposal,
    RequestColumns,
    View,
    WakeWorker,
)

Commands = list[tuple[Address, Any]]
ANSWER_TOKENS = 128.0  # length of an output, until some have ended
LENGTH_BLEND = 0.05  # weight of the newest one
FIT_EVERY_S = 0.5  # reports of steps are gathered for so long: many cost hardly more than one


class WorkerRegistry:
    """All workers. Commands gather in `out` until the cluster scheduler hands them on."""

    def __init__(self, num_workers: int, config: ClusterConfig):
        self.ledger = Ledger(num_workers)
        self.models: dict[str, ModelKv] = {}
        self.arithmetic: dict[int, str] = {}  # of workers that have been ready
        self.out: Commands = []
        self.in_flight = InFlight()
        self._queued: Counter[int] = Counter()  # by worker: tokens of requests yet to be computed
        self._computed: Counter[int] = Counter()  # of these, those that it has reported
        self._estimates: Estimates | None = None
        self._fit_s = 0.0  # when reports of steps are next looked into
        self._epochs = count(1)
        self._largest: dict[str, int | None] = {}  # arena, by model; forgotten with every change
        self._has_woken = False  # anybody, ever
        self.view = View(
            now=0.0,
            workers=self.ledger,
            requests=RequestColumns(),
            waiting_bytes=0,
            growth_Bps=np.zeros(num_workers + 1),
            token_rate=0.0,
            answer_tokens=ANSWER_TOKENS,
            horizon_s=config.horizon_s,
            park_after_s=config.park_after_s,
            seed=config.seed,
            tick=0,
            period_s=config.rebalance_every_s,
            thrift=config.thrift,
        )
        self.rates = GrowthRates(self.view)

    @property
    def estimates(self) -> Estimates:
        """What has been measured so far; before that, what the view's costs say."""
        if self._estimates is None:
            self._estimates = Estimates(self.view.cost)
        return self._estimates

    def take(self) -> Commands:
        """The commands gathered since the last call."""
        commands, self.out = self.out, []
        return commands

    def send(self, worker: int, command: Any, num_bytes: int = 0) -> None:
        """Order something of a worker; it will take `num_bytes` of its arena."""
        if self.ledger.state[worker] != LOST:
            self.ledger.order(worker, num_bytes)
            self.out.append((worker, command))

    def next_epoch(self) -> int:
        """A number that no assignment and no offer has had before."""
        return next(self._epochs)

    # --- who owns what --------------------------------------------------------------------------

    def own(self, record: Record, worker: int, epoch: int) -> None:
        """The worker, in whose `num_requests` it is already counted, is the owner from here on."""
        record.worker, record.epoch = worker, epoch
        record.num_placed, record.transfer_failed = len(record.log.tokens), False
        requests = self.view.requests
        self._count(record.slot, worker)
        requests.worker[record.slot], requests.placed_s[record.slot] = worker, self.view.now
        requests.movable[record.slot] = True
        if record.plan is None:  # what a move has to compute is counted with it
            record.queued = record.num_tokens
            self._queued[worker] += record.queued

    def unqueue(self, record: Record) -> None:
        """The owner decodes it, or owns it no more."""
        if record.queued and record.worker is not None:
            self._queued[record.worker] -= record.queued
            computed = self._computed[record.worker] - record.queued
            self._computed[record.worker] = max(0, computed)
            record.queued = 0

    def queued_tokens(self, worker: int) -> int:
        """Tokens of prompts that a worker has yet to compute, as far as rank 0 has heard."""
        return max(0, self._queued[worker] - self._computed[worker])

    def leave(self, record: Record) -> None:
        """It has no owner from here on."""
        self.unqueue(record)
        if record.worker is not None:
            self.ledger.remove(record.worker, self.view.now)
        record.worker = record.epoch = None
        requests = self.view.requests
        self._count(record.slot, 0)
        requests.worker[record.slot], requests.movable[record.slot] = 0, False

    def _count(self, row: int, worker: int) -> None:
        """The size_classes, if there is one, hears that the request changes to this worker."""
        if (size_classes := self.view.size_classes) is not None:
            requests = self.view.requests
            size_classes.enter(
                row, requests.need(row), int(requests.worker[row]), worker, self.ledger
            )

    def keep_for(self, record: Record, worker: int) -> None:
        """It waits to resume on this worker, which takes no others meanwhile; 0: on any."""
        home = self.view.requests.home
        if home[record.slot]:
            self.ledger.expect(int(home[record.slot]), -1)
        home[record.slot] = worker
        if worker:
            self.ledger.expect(worker, 1)

    def can_return(self, worker: int, num_bytes: int) -> bool:
        """Has its former worker room for it again?"""
        return bool(self.ledger.state[worker] == ACTIVE) and self._holds(worker, num_bytes)

    # --- states ---------------------------------------------------------------------------------

    def ready(self, worker: int, event: WorkerReady) -> None:
        self._learn_wake(event.wake_s, bool(self.ledger.state[worker] == WorkerState.WAKING))
        self.ledger.ready(
            worker, event.models, event.capacity_bytes, event.max_num_seqs, event.acked
        )
        self.ledger.empty_since_s[worker] = self.view.now
        self.models |= {m.model: m for m in event.models}
        self.arithmetic[worker] = event.arithmetic
        budget = StepBudget(event.max_batched_tokens, event.target_step_s)
        self.estimates.steps.begin(worker, budget, event.step_s)
        self._changed(worker)

    def _learn_wake(self, wake_s: float, woken: bool) -> None:
        """Starts, which compile and convert, too, count until somebody has been woken."""
        cost = self.view.cost
        if woken and not self._has_woken:
            self._has_woken, self.view.cost = True, replace(cost, wake_s=wake_s)
        elif woken or not self._has_woken:
            self.view.cost = cost.after_wake(wake_s)

    def change(self, worker: int, state: WorkerState) -> None:
        self.ledger.enter(worker, state)
        self._changed(worker)

    def _changed(self, worker: int) -> None:
        self._largest.clear()
        name = WorkerState(int(self.ledger.state[worker])).name.lower()
        self.out.append((OBSERVER, WorkerChanged(worker, name)))

    def obey(self, proposal: Proposal) -> None:
        """Drain, park or wake a worker; any other proposal is about a request."""
        match proposal:
            case Drain(worker):
                self.drain(worker)
            case ParkWorker(worker):
                self.park(worker)
            case WakeWorker(worker):
                self.wake(worker)

    def drain(self, worker: int) -> None:
        """Nothing new goes there any more; it parks when it is empty.

        Not the last one of a model in use: what it holds could go nowhere, and the next arrival
        would call it back.
        """
        if self.ledger.state[worker] == ACTIVE and not self._is_last(worker):
            self.change(worker, WorkerState.DRAINING)

    def park(self, worker: int) -> None:
        """Tell an empty worker to give its arena back; nothing if it is not empty or not active."""
        idle = not self.ledger.num_requests[worker] and not self._is_last(worker)
        if idle and self.ledger.state[worker] in (WorkerState.ACTIVE, WorkerState.DRAINING):
            self.send(worker, Park())
            self.change(worker, WorkerState.PARKING)

    def _is_last(self, worker: int) -> bool:
        """Is it the last active worker of a model that some live request asks for?"""
        ledger, requests = self.ledger, self.view.requests
        used = np.bincount(requests.model[requests.live], minlength=len(ledger.models)) > 0
        active = ledger.state == WorkerState.ACTIVE
        active[worker] = False
        served = (ledger.runs & active).any(axis=1)
        return bool((used & ledger.runs[:, worker] & ~served).any())

    def parked(self, worker: int) -> None:
        self.ledger.gone(worker, WorkerState.PARKED)
        self._changed(worker)

    def wake(self, worker: int) -> None:
        """Make a parked worker load again, or a draining one stay; else nothing."""
        if self.ledger.state[worker] == WorkerState.PARKED:
            self.send(worker, Wake())
            self.change(worker, WorkerState.WAKING)
        elif self.ledger.state[worker] == WorkerState.DRAINING:
            self.change(worker, WorkerState.ACTIVE)

    def lost(self, worker: int) -> None:
        self.ledger.gone(worker, WorkerState.LOST)
        self._changed(worker)

    def undrain(self, model: str) -> bool:
        """Let draining workers take requests of this model again; True if there was one."""
        able = self.ledger.able(model)
        draining = [w for w in self.ledger.workers(WorkerState.DRAINING) if able[w]]
        for worker in draining:
            self.change(worker, WorkerState.ACTIVE)
        return bool(draining)

    def wake_for(self, model: str, waiting_bytes: int, waited_s: float) -> None:
        """Wake one worker more, unless there will be room for the queue before it is awake.

        That is: those that are waking already have room, or as much is going to be free. Who has
        waited as long as waking takes waits for no more ends: the guess was wrong.
        """
        ledger, able, wake_s = self.ledger, self.ledger.able(model), self.view.cost.wake_s
        parked = np.flatnonzero(able & (ledger.state == WorkerState.PARKED))
        lacking = waiting_bytes - ledger.capacity[able & (ledger.state == WorkerState.WAKING)].sum()
        if not len(parked) or lacking <= 0:
            return
        if waited_s >= wake_s or lacking > self._freed_in(wake_s, able):
            self.wake(int(parked[0]))

    def _freed_in(self, seconds: float, able: np.ndarray) -> float:
        """Bytes that requests of these active workers free by ending, less what the others grow."""
        view, ledger = self.view, self.ledger
        active = able & (ledger.state == WorkerState.ACTIVE)
        ending = min(1.0, seconds * view.token_rate / max(view.answer_tokens, 1.0))
        held = (ledger.capacity - ledger.budget)[active].sum()
        grown = seconds * view.growth_Bps[active].sum()
        return float(ending * held - (1 - ending) * grown)

    def has_room(self, worker: int, model: str, num_bytes: int) -> bool:
        """May a request of this model and size be moved there?"""
        return bool(self.view.hosting(model)[worker]) and self._holds(worker, num_bytes)

    def space(self, worker: int) -> tuple[int, int]:
        """What is left there: (bytes, seats)."""
        ledger = self.ledger
        seats = int(ledger.max_requests[worker] - ledger.num_requests[worker])
        return ledger.room(worker), seats

    def gained(self, worker: int, before: tuple[int, int]) -> bool:
        """Has it more bytes or seats than then?"""
        room, seats = self.space(worker)
        return room > before[0] or seats > before[1]

    def _holds(self, worker: int, num_bytes: int) -> bool:
        """Has it a seat, and so many bytes?"""
        ledger = self.ledger
        seat = ledger.num_requests[worker] < ledger.max_requests[worker]
        return bool(seat) and ledger.room(worker) >= num_bytes

    def refusal(self, request: Request, num_tokens: int) -> str | None:
        """Why no worker that is left can ever hold so many tokens of it, or None."""
        if (kv := self.models.get(request.model)) is None:
            return f"no worker serves the model {request.model}"
        need, room = kv_need(kv, num_tokens), self._largest_arena(request.model)
        if room == 0:
            return f"no worker is left that serves the model {request.model}"
        if room is None or need <= room:
            return None
        return f"it needs {need} bytes of KV cache; a worker has {room}"

    def _largest_arena(self, model: str) -> int | None:
        """Bytes; 0 if all that had one are lost, None as long as somebody may still get one."""
        if model not in self._largest:
            ledger = self.ledger
            left = ledger.able(model) & (ledger.state != WorkerState.LOST)
            largest = int(ledger.capacity[left].max(initial=0))
            self._largest[model] = None if ledger.workers(WorkerState.STARTING) else largest
        return self._largest[model]

    # --- rates ----------------------------------------------------------------------------------

    def finished(self, num_prompt: int, num_outputs: int) -> None:
        """A request has ended after so many tokens: what is to come may be like it."""
        self.view.lengths.add(num_prompt, num_outputs)
        self.view.answer_tokens += LENGTH_BLEND * (num_outputs - self.view.answer_tokens)

    def report(self, worker: int, event: StepReport) -> None:
        if int(self.ledger.state[worker]) in WITHOUT_ARENA:
            return  # of what it did before it parked: there is no arena any more
        self.ledger.report(worker, event.acked, event.free_bytes)
        self.estimates.steps.add(worker, event)
        if event.prefill_tokens:  # those of a move are counted with the move
            done = self._computed[worker] + event.prefill_tokens
            self._computed[worker] = min(done, self._queued[worker])
        self.rates.decoded[worker] += event.decode_tokens

    def tick(self, now: float) -> None:
        """Turn what was done since the last tick into rates and costs."""
        self.estimates.look_again(now)
        if now >= self._fit_s and self.estimates.steps.fold():
            self._fit_s = now + FIT_EVERY_S
            self.view.cost = self.view.cost.with_steps(self.estimates.steps.coefficients())
        self.rates.tick(now)
        self.view.tick += 1
