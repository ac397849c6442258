"""Rank 0's mind: which request is where, and what must be done next. Pure.

Events come in, commands go out; time is an argument. The transition table is that of
docs/design.md; every change of a request's state is one call of `Record.move`.
"""

from typing import Any

import numpy as np

from mellmpi.config import ClusterConfig
from mellmpi.protocol import (
    FRONT,
    OBSERVER,
    Address,
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
    finish_reason,
)
from mellmpi.scheduler.ledger import ACTIVE, WorkerState
from mellmpi.scheduler.migration import Handover, planned
from mellmpi.scheduler.placement import Placement
from mellmpi.scheduler.planner import RECOMPUTE, Plan
from mellmpi.scheduler.policies import Policy
from mellmpi.scheduler.requests import (
    Log,
    Record,
    State,
    TokenLog,
    aligned,
)
from mellmpi.scheduler.view import MoveProposal, Proposal
from mellmpi.scheduler.workers import Commands, WorkerRegistry


class ClusterScheduler:
    """All live requests, the one queue, and the policy's proposals checked and enacted."""

    def __init__(self, num_workers: int, config: ClusterConfig, policy: Policy):
        self.config, self.policy = config, policy
        self.registry = WorkerRegistry(num_workers, config)
        self.handover = Handover(self.registry)
        self.placement = Placement(self.registry, self.handover, policy)
        self.records, self.queue = self.placement.records, self.placement.queue
        self._lost: set[int] = set()
        self._next_tick_s = 0.0
        self._stirred_s = 0.0  # the last event, or command of a tick
        self._ticked = False  # since somebody who waits was tried last

    def handle(self, source: Address, event: Any, now: float) -> Commands:
        """Apply one event; return what must be sent because of it."""
        if source in self._lost:
            return []  # whatever it did has been given to others
        self.registry.view.now = self._stirred_s = now
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
                self.registry.estimates.links.measured(event)
            case WorkerReady():
                self.registry.ready(int(source), event)
            case Parked():
                self.registry.parked(int(source))
            case WorkerLost(worker):
                self._worker_lost(worker)
            case _:
                raise TypeError(event)
        self.placement.resume(source)
        self.placement.place_waiting()
        return self.registry.take()

    def _reported(self, worker: int, report: StepReport) -> Commands:
        """By far the most frequent event: who waits is tried again where it has made room.

        And once after every tick, for what else may have changed.
        """
        before = self.registry.space(worker) if self.queue and not self._ticked else None
        self._report(worker, report)
        if self.placement.resume(worker) or before is None or self.registry.gained(worker, before):
            self._ticked = False
            self.placement.place_waiting()
        return self.registry.take()

    def tick(self, now: float) -> Commands:
        """Let the policy act, at most once in `rebalance_every_s`, as long as it may want to."""
        if now < self._next_tick_s or self.at_rest(now):
            return []
        self._next_tick_s = now + self.config.rebalance_every_s
        self._ticked = True
        self.registry.view.now = now
        self.registry.tick(now)
        self._round()
        if self.registry.out:
            self._stirred_s = now
        return self.registry.take()

    def at_rest(self, now: float) -> bool:
        """There are no requests, and who was to be parked has been: only an event ends it."""
        parked_s = self.config.park_after_s + 2 * self.config.rebalance_every_s
        return not self.records and now - self._stirred_s > parked_s

    def _round(self) -> None:
        view = self.registry.view
        view.waiting_bytes = self.queue.kv_bytes
        self._enact(self.policy.rebalance(view))
        for worker in self.registry.ledger.workers(WorkerState.DRAINING):
            self.registry.park(worker)
        for worker in self.queue.homes():
            if self.registry.ledger.state[worker] != ACTIVE:
                self.placement.turn_away(worker)
        if view.cost.wake_s:  # who was made to wait for room may have waited long enough
            for record in self.queue.heads():
                self.placement.wake_for(record.request.model)

    # --- a request comes and goes ---------------------------------------------------------------

    def _submit(self, request: Request, now: float) -> None:
        assert request.id not in self.records, f"request {request.id} submitted twice"
        # The last token is never read again: it needs no KV.
        longest = len(request.prompt) + request.sampling.max_tokens - 1
        if (why := self.registry.refusal(request, longest)) is not None:
            self.registry.out.append((FRONT, Rejected(request.id, why)))
            return
        model = self.registry.ledger.models.index(request.model)
        kv = self.registry.models[request.model]
        row = self.registry.view.requests.add(request, now, kv, model)
        record = Record(request, now, row, log=self.log_for(row))
        self.records[request.id] = record
        self.queue.append(record, self.placement.kv_bytes(record), now)

    def log_for(self, row: int) -> Log:
        """Where the tokens of the request in this row of the view are kept."""
        return TokenLog()

    def _cancel(self, request_id: int) -> None:
        if (record := self.records.get(request_id)) is None:
            return  # it finished meanwhile
        if record.worker is not None:
            worker, epoch = record.owner
            self.registry.send(worker, Release(request_id, epoch))
        self.placement.forget(record, "cancelled")

    # --- tokens ---------------------------------------------------------------------------------

    def _report(self, worker: int, report: StepReport) -> None:
        self.registry.report(worker, report)
        logprobs, records, tokens = dict(report.logprobs), self.records, report.tokens
        runs = zip(report.request_ids, report.epochs, report.firsts, report.counts, strict=True)
        rows, added, end, now = [], [], 0, self.registry.view.now
        for i, (request_id, epoch, first, num_tokens) in enumerate(runs):
            start, end = end, end + num_tokens
            record = records.get(request_id)
            if record is not None and record.epoch == epoch:
                rows.append(record.slot)
                if record.landed is not None:
                    self.handover.resumed(record)
                record.told_s = now
                added.append(self._tokens(record, first, tokens[start:end], logprobs.get(i, ())))
        if rows:
            self._count(rows, added)
        # Only now: what it had produced by then is in the log.
        for request_id, epoch in report.preempted:
            record = self.records.get(request_id)
            if record is not None and record.epoch == epoch:
                self.registry.out.append((OBSERVER, Preempted(request_id, worker)))
                self.placement.wait_again(record, "preempted", self.placement.home(record, worker))

    def _count(self, rows: list[int], added: list[int]) -> None:
        """So many output tokens more in these rows of the view; no row comes twice."""
        self.registry.view.requests.num_tokens[np.array(rows)] += np.array(added)

    def _tokens(
        self, record: Record, first: int, run: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]
    ) -> int:
        """Log and emit what is new of a run; so many tokens, which are yet to be counted."""
        new = record.log.merge(first, run)
        if not new:
            return 0
        if record.moved_from is not None:
            self.handover.recomputed(record, "moved")
        self.registry.unqueue(record)
        request, outputs = record.request, record.log.tokens
        reason = finish_reason(request, outputs)
        if logprobs:
            logprobs = aligned(logprobs, len(run), len(new))
        emit = Emit(request.id, len(outputs) - len(new), new, logprobs, reason)
        self.registry.out.append((FRONT, emit))
        if reason:
            self.registry.finished(len(request.prompt), len(outputs))
            self.placement.forget(record, "finished")
        return len(new)

    # --- what the policy wants ------------------------------------------------------------------

    def _enact(self, proposals: list[Proposal]) -> None:
        """Do what can still be done; all moves are decided together."""
        for proposal in proposals:
            self.registry.obey(proposal)
        moves = [proposal for proposal in proposals if isinstance(proposal, MoveProposal)]
        limit_s = self.config.migration_limit_s
        for record, move, plan in planned(moves, self.records, self.registry, limit_s):
            self._move(record, move, plan)

    def _move(self, record: Record, move: MoveProposal, plan: Plan) -> None:
        num_bytes = self.placement.kv_bytes(record)
        if not self.registry.has_room(move.dst, record.request.model, num_bytes):
            return
        self.handover.announce(record, move, plan)
        if plan.mode == RECOMPUTE:
            self._recompute(record, move)
        else:
            self.handover.offer(record, move, num_bytes, plan.start)

    def _recompute(self, record: Record, move: MoveProposal) -> None:
        src, epoch = record.owner
        self.registry.send(src, Release(record.request.id, epoch))
        self.registry.leave(record)
        record.move(State.WAITING, f"recompute at {move.dst}: {move.reason}")
        record.moved_from = src
        self.placement.assign(record, move.dst)

    # --- what workers tell ----------------------------------------------------------------------

    def _answer(self, source: int, event: Any) -> None:
        record = self.records.get(event.request_id)
        if record is not None and self.handover.answer(record, source, event):
            added = self._tokens(record, event.first, event.tokens, event.logprobs)
            self._count([record.slot], [added])

    def _worker_lost(self, worker: int) -> None:
        if worker in self._lost:
            return
        self._lost.add(worker)
        self.registry.lost(worker)
        self.placement.turn_away(worker)
        # Last first, each to the head of the queue: they wait in the order they came in.
        for record in reversed(list(self.records.values())):
            if record.worker == worker and (why := record.owner_died()) is not None:
                self.placement.refuse(record, why)
            elif record.worker == worker:
                self.placement.wait_again(record, f"worker {worker} lost")
            elif record.offer is not None and record.offer.dst == worker:
                self.handover.destination_lost(record, f"worker {worker} lost")
