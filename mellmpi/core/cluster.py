"""Rank 0's mind: which request is where, and what must be done next. Pure.

Events come in, commands go out; time is an argument. The transition table is that of
docs/design.md; every change of a request's state is one call of `Record.move`.
"""

from typing import Any

import numpy as np

from mellmpi.config import ClusterConfig
from mellmpi.core.fleet import Commands, Fleet
from mellmpi.core.ledger import ACTIVE, WorkerState
from mellmpi.core.migration import RECOMPUTE, Plan
from mellmpi.core.moves import planned
from mellmpi.core.policies import Policy
from mellmpi.core.queue import WaitingQueue
from mellmpi.core.requests import Log, Record, State, TokenLog, aligned, finish_reason
from mellmpi.core.ring import Ring
from mellmpi.core.view import Move, Proposal, kv_need
from mellmpi.protocol import (
    FRONT,
    OBSERVER,
    Address,
    Assign,
    Cancel,
    Emit,
    KvFailed,
    KvReceived,
    KvRefused,
    KvReserved,
    LinksMeasured,
    Parked,
    Preempted,
    Rejected,
    Release,
    Request,
    StepReport,
    Submit,
    TokenLogprob,
    WorkerLost,
    WorkerReady,
)


class ClusterScheduler:
    """All live requests, the one queue, and the policy's proposals checked and enacted."""

    def __init__(self, num_workers: int, config: ClusterConfig, policy: Policy):
        self.config, self.policy = config, policy
        self.fleet = Fleet(num_workers, config)
        self.records: dict[int, Record] = {}
        self.queue = WaitingQueue()
        self.ring = Ring(self.fleet)
        self._lost: set[int] = set()
        self._next_tick_s = 0.0
        self._stirred_s = 0.0  # the last event, or command of a tick
        self._ticked = False  # since somebody who waits was tried last

    def handle(self, source: Address, event: Any, now: float) -> Commands:
        """Apply one event; return what must be sent because of it."""
        if source in self._lost:
            return []  # whatever it did has been given to others
        self.fleet.view.now = self._stirred_s = now
        match event:
            case StepReport():
                return self._reported(int(source), event)
            case Submit(request):
                self._submit(request, now)
            case Cancel(request_id, _):
                self._cancel(request_id)
            case KvReserved() | KvRefused() | KvReceived() | KvFailed():
                self._answer(int(source), event)
            case LinksMeasured():
                self.fleet.estimates.links.measured(event)
            case WorkerReady():
                self.fleet.ready(int(source), event)
            case Parked():
                self.fleet.parked(int(source))
            case WorkerLost(worker):
                self._worker_lost(worker)
            case _:
                raise TypeError(event)
        self._resume(source)
        self._place_waiting()
        return self.fleet.take()

    def _reported(self, worker: int, report: StepReport) -> Commands:
        """By far the most frequent event: who waits is tried again where it has made room.

        And once after every tick, for what else may have changed.
        """
        before = self.fleet.space(worker) if self.queue and not self._ticked else None
        self._report(worker, report)
        if self._resume(worker) or before is None or self.fleet.gained(worker, before):
            self._ticked = False
            self._place_waiting()
        return self.fleet.take()

    def tick(self, now: float) -> Commands:
        """Let the policy act, at most once in `rebalance_every_s`, as long as it may want to."""
        if now < self._next_tick_s or self.at_rest(now):
            return []
        self._next_tick_s = now + self.config.rebalance_every_s
        self._ticked = True
        self.fleet.view.now = now
        self.fleet.tick(now)
        self._round()
        if self.fleet.out:
            self._stirred_s = now
        return self.fleet.take()

    def at_rest(self, now: float) -> bool:
        """There are no requests, and who was to be parked has been: only an event ends it."""
        parked_s = self.config.park_after_s + 2 * self.config.rebalance_every_s
        return not self.records and now - self._stirred_s > parked_s

    def _round(self) -> None:
        view = self.fleet.view
        view.waiting_bytes = self.queue.kv_bytes
        self._enact(self.policy.rebalance(view))
        for worker in self.fleet.ledger.workers(WorkerState.DRAINING):
            self.fleet.park(worker)
        for worker in self.queue.homes():
            if self.fleet.ledger.state[worker] != ACTIVE:
                self._turn_away(worker)
        if view.cost.wake_s:  # who was made to wait for room may have waited long enough
            for record in self.queue.heads():
                self._wake_for(record.request.model)

    # --- a request comes and goes ---------------------------------------------------------------

    def _submit(self, request: Request, now: float) -> None:
        assert request.id not in self.records, f"request {request.id} submitted twice"
        # The last token is never read again: it needs no KV.
        longest = len(request.prompt) + request.sampling.max_tokens - 1
        if (why := self.fleet.refusal(request, longest)) is not None:
            self.fleet.out.append((FRONT, Rejected(request.id, why)))
            return
        model = self.fleet.ledger.models.index(request.model)
        kv = self.fleet.models[request.model]
        row = self.fleet.view.requests.add(request, now, kv, model)
        record = Record(request, now, row, log=self.log_for(row))
        self.records[request.id] = record
        self.queue.append(record, self._kv_bytes(record), now)

    def log_for(self, row: int) -> Log:
        """Where the tokens of the request in this row of the view are kept."""
        return TokenLog()

    def _cancel(self, request_id: int) -> None:
        if (record := self.records.get(request_id)) is None:
            return  # it finished meanwhile
        if record.worker is not None:
            worker, epoch = record.owner
            self.fleet.send(worker, Release(request_id, epoch))
        self._forget(record, "cancelled")

    def _forget(self, record: Record, outcome: str) -> None:
        """The request is over: nothing of it stays on rank 0, nor at a destination."""
        self.ring.withdraw(record, outcome)
        self.fleet.leave(record)
        self.queue.remove(record)
        self.fleet.keep_for(record, 0)
        del self.records[record.request.id]
        self.fleet.view.requests.drop(record.slot)

    # --- tokens ---------------------------------------------------------------------------------

    def _report(self, worker: int, report: StepReport) -> None:
        self.fleet.report(worker, report)
        logprobs, records, tokens = dict(report.logprobs), self.records, report.tokens
        runs = zip(report.request_ids, report.epochs, report.firsts, report.counts, strict=True)
        rows, added, end, now = [], [], 0, self.fleet.view.now
        for i, (request_id, epoch, first, num_tokens) in enumerate(runs):
            start, end = end, end + num_tokens
            record = records.get(request_id)
            if record is not None and record.epoch == epoch:
                rows.append(record.slot)
                if record.landed is not None:
                    self.ring.resumed(record)
                record.told_s = now
                added.append(self._tokens(record, first, tokens[start:end], logprobs.get(i, ())))
        if rows:
            self._count(rows, added)
        # Only now: what it had produced by then is in the log.
        for request_id, epoch in report.preempted:
            record = self.records.get(request_id)
            if record is not None and record.epoch == epoch:
                self.fleet.out.append((OBSERVER, Preempted(request_id, worker)))
                self._wait_again(record, "preempted", self._home(record, worker))

    def _count(self, rows: list[int], added: list[int]) -> None:
        """So many output tokens more in these rows of the view; no row comes twice."""
        self.fleet.view.requests.num_tokens[np.array(rows)] += np.array(added)

    def _tokens(self, record: Record, first: int, run: tuple[int, ...],
                logprobs: tuple[TokenLogprob, ...]) -> int:  # fmt: skip
        """Log and emit what is new of a run; so many tokens, which are yet to be counted."""
        new = record.log.merge(first, run)
        if not new:
            return 0
        if record.moved_from is not None:
            self.ring.recomputed(record, "moved")
        self.fleet.unqueue(record)
        request, outputs = record.request, record.log.tokens
        reason = finish_reason(request, outputs)
        if logprobs:
            logprobs = aligned(logprobs, len(run), len(new))
        emit = Emit(request.id, len(outputs) - len(new), new, logprobs, reason)
        self.fleet.out.append((FRONT, emit))
        if reason:
            self.fleet.finished(len(request.prompt), len(outputs))
            self._forget(record, "finished")
        return len(new)

    # --- placement ------------------------------------------------------------------------------

    def _resume(self, worker: Address) -> bool:
        """Who was preempted there goes back as soon as it fits; only its own word makes room.

        True if somebody did: with nobody left who is to resume there, it takes new ones again.
        """
        if not isinstance(worker, int):
            return False
        returned = [self._returns(r, worker) for r in self.queue.returning(worker)]
        return any(returned)

    def _returns(self, record: Record, worker: int) -> bool:
        if not self.fleet.can_return(worker, self._kv_bytes(record)):
            return False
        self.queue.remove(record)
        self._assign(record, worker)
        return True

    def _home(self, record: Record, worker: int) -> int:
        """The worker on which a preempted request has to resume; 0: on any."""
        ledger = self.fleet.ledger
        stays = self.policy.resumes_at_home and ledger.state[worker] == ACTIVE
        return worker if stays and self._kv_bytes(record) <= ledger.capacity[worker] else 0

    def _turn_away(self, worker: int) -> None:
        """It is nobody's home any more."""
        for record in self.queue.turn_away(worker):
            self.fleet.keep_for(record, 0)

    def _place_waiting(self) -> None:
        """Place the queue in its order; a model whose head fits nowhere is passed over."""
        full: set[str] = set()
        while (record := self.queue.head(full)) is not None:
            if not self._place(record):
                full.add(record.request.model)

    def _place(self, record: Record) -> bool:
        """Assign or refuse it, or get a worker back for it; False: it has to wait."""
        model = record.request.model
        worker = self.policy.place(self.fleet.view, record.slot, model)
        if worker is not None:
            self.queue.remove(record)
            self._assign(record, worker)
        elif (why := self.fleet.refusal(record.request, record.num_tokens)) is not None:
            self._refuse(record, why)
        elif not self.fleet.undrain(model):
            self._wake_for(model)
            return False
        return True

    def _refuse(self, record: Record, why: str) -> None:
        self.fleet.out.append((FRONT, Rejected(record.request.id, why)))
        self._forget(record, "refused")

    def _wake_for(self, model: str) -> None:
        waited_s = self.fleet.view.now - self.queue.waits_since_s(model)
        self.fleet.wake_for(model, self.queue.lane_bytes(model), waited_s)

    def _assign(self, record: Record, worker: int) -> None:
        epoch = self.fleet.next_epoch()
        record.move(State.RUNNING, f"assigned to {worker} under {epoch}")
        self.fleet.keep_for(record, 0)
        self.fleet.ledger.add(worker)
        self.fleet.own(record, worker, epoch)
        order = Assign(record.request, epoch, tuple(record.log.tokens))
        self.fleet.send(worker, order, self._kv_bytes(record))

    def _kv_bytes(self, record: Record) -> int:
        return kv_need(self.fleet.models[record.request.model], record.num_tokens)

    def _wait_again(self, record: Record, why: str, home: int = 0) -> None:
        """The owner has lost it, or given it back: first in the queue."""
        self.ring.withdraw(record, why)
        self.fleet.leave(record)
        record.move(State.WAITING, why)
        self.queue.prepend(record, self._kv_bytes(record), self.fleet.view.now, home)
        self.fleet.keep_for(record, home)

    # --- what the policy wants ------------------------------------------------------------------

    def _enact(self, proposals: list[Proposal]) -> None:
        """Do what can still be done; all moves are decided together."""
        for proposal in proposals:
            self.fleet.obey(proposal)
        moves = [proposal for proposal in proposals if isinstance(proposal, Move)]
        limit_s = self.config.migration_limit_s
        for record, move, plan in planned(moves, self.records, self.fleet, limit_s):
            self._move(record, move, plan)

    def _move(self, record: Record, move: Move, plan: Plan) -> None:
        num_bytes = self._kv_bytes(record)
        if not self.fleet.has_room(move.dst, record.request.model, num_bytes):
            return
        self.ring.announce(record, move, plan)
        if plan.mode == RECOMPUTE:
            self._recompute(record, move)
        else:
            self.ring.offer(record, move, num_bytes, plan.start)

    def _recompute(self, record: Record, move: Move) -> None:
        src, epoch = record.owner
        self.fleet.send(src, Release(record.request.id, epoch))
        self.fleet.leave(record)
        record.move(State.WAITING, f"recompute at {move.dst}: {move.reason}")
        record.moved_from = src
        self._assign(record, move.dst)

    # --- what workers tell ----------------------------------------------------------------------

    def _answer(self, source: int, event: Any) -> None:
        record = self.records.get(event.request_id)
        if record is not None and self.ring.answer(record, source, event):
            added = self._tokens(record, event.first, event.tokens, event.logprobs)
            self._count([record.slot], [added])

    def _worker_lost(self, worker: int) -> None:
        if worker in self._lost:
            return
        self._lost.add(worker)
        self.fleet.lost(worker)
        self._turn_away(worker)
        # Last first, each to the head of the queue: they wait in the order they came in.
        for record in reversed(list(self.records.values())):
            if record.worker == worker and (why := record.owner_died()) is not None:
                self._refuse(record, why)
            elif record.worker == worker:
                self._wait_again(record, f"worker {worker} lost")
            elif record.offer is not None and record.offer.dst == worker:
                self.ring.destination_lost(record, f"worker {worker} lost")
