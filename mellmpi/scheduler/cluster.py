"""The state machine of rank 0: events in, commands out. Pure; time is an argument.

The transition table is that of docs/design.md; every change of a request's state is one call of
`Record.move`.
"""

import numpy as np

from mellmpi.config import ClusterConfig
from mellmpi.protocol import (
    FRONT,
    OBSERVER,
    Address,
    Cancel,
    DrainWorker,
    Emit,
    KvFailed,
    KvReceived,
    KvRefused,
    KvReserved,
    LinksMeasured,
    MoveRequest,
    OfferAnswer,
    Parked,
    Preempted,
    PromptLogprob,
    Rejected,
    Request,
    SchedulerEvent,
    StepReport,
    Submit,
    TokenLogprob,
    UndrainWorker,
    WorkerLost,
    WorkerReady,
    finish_reason,
)
from mellmpi.scheduler.ledger import ACTIVE, WorkerState
from mellmpi.scheduler.migration import Handover
from mellmpi.scheduler.moves import Moves
from mellmpi.scheduler.operator import Operator
from mellmpi.scheduler.placement import Placement
from mellmpi.scheduler.policies import Policy
from mellmpi.scheduler.requests import (
    Log,
    Record,
    TokenLog,
    aligned,
)
from mellmpi.scheduler.view import MoveProposal, Proposal
from mellmpi.scheduler.workers import Commands, WorkerRegistry


class ClusterScheduler:
    """Handles events of front and workers, and carries out the proposals of the policy."""

    def __init__(self, num_workers: int, config: ClusterConfig, policy: Policy):
        self.config = config
        self.registry = WorkerRegistry(num_workers, config)
        self.handover = Handover(self.registry)
        self.placement = Placement(self.registry, self.handover, policy)
        self.moves = Moves(self.placement)
        self.operator = Operator(self.placement, self.moves, config.migration_limit_s)
        self.records, self.queue = self.placement.records, self.placement.queue
        self._lost: set[int] = set()  # workers
        self._next_tick_s = 0.0
        self._active_s = 0.0  # time of the last event, or of the last tick with commands
        self._ticked = False  # a tick has run since the queue was last placed after a report

    def handle(self, source: Address, event: SchedulerEvent, now: float) -> Commands:
        """Apply one event; return the commands that follow. TypeError for any other message.

        now  seconds, of the same clock as in `tick`
        """
        if source in self._lost:
            return []  # its requests have been assigned to other workers
        self.registry.view.now = self._active_s = now
        match event:
            case StepReport():
                return self._reported(int(source), event)
            case Submit(request):
                self._submit(request, now)
            case Cancel(request_id, _):
                self._cancel(request_id)
            case DrainWorker() | UndrainWorker() | MoveRequest():
                self.operator.handle(event)
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
        self._place()
        return self.registry.take()

    def _place(self) -> None:
        """Place the queue, after the requests of held workers: these have begun before."""
        self.operator.evacuate()
        self.placement.place_waiting()

    def _reported(self, worker: int, report: StepReport) -> Commands:
        """Apply a report, the most frequent event.

        The queue is placed only if the worker has gained room, and once after every tick.
        """
        admission = self.registry.admission
        before = admission.space(worker) if self.queue and not self._ticked else None
        self._report(worker, report)
        if self.placement.resume(worker) or before is None or admission.gained(worker, before):
            self._ticked = False
            self._place()
        return self.registry.take()

    def tick(self, now: float) -> Commands:
        """Run a rebalancing round, at most one in `rebalance_every_s` and none at rest."""
        if now < self._next_tick_s or self.at_rest(now):
            return []
        self._next_tick_s = now + self.config.rebalance_every_s
        self._ticked = True
        self.registry.view.now = now
        self.registry.tick(now)
        self._round()
        if self.registry.out:
            self._active_s = now
        return self.registry.take()

    def at_rest(self, now: float) -> bool:
        """True if there are no requests and idle workers have had time to park.

        Rounds then change nothing until the next event.
        """
        parked_s = self.config.park_after_s + 2 * self.config.rebalance_every_s
        return not self.records and now - self._active_s > parked_s

    def _round(self) -> None:
        view = self.registry.view
        self.placement.end_overdue()
        view.waiting_bytes = self.queue.kv_bytes
        self.operator.evacuate()
        self._enact(self.placement.policy.rebalance(view))
        for worker in self.registry.ledger.workers(WorkerState.DRAINING):
            self.registry.park(worker)
        for worker in self.queue.pinning_workers():
            if self.registry.ledger.state[worker] != ACTIVE:
                self.placement.unpin(worker)
        if view.cost.wake_s:  # a request may have waited long enough by now
            for record in self.queue.heads():
                self.placement.wake_for(record.request.model)

    # --- submission and cancellation ------------------------------------------------------------

    def _submit(self, request: Request, now: float) -> None:
        assert request.id not in self.records, f"request {request.id} submitted twice"
        # The KV of the last token is never computed.
        longest = len(request.prompt) + request.sampling.max_tokens - 1
        if (why := self.registry.admission.refusal(request, longest)) is not None:
            self.registry.out.append((FRONT, Rejected(request.id, why, 0.0)))
            return
        first_tokens, num_prompt = self.placement.first_tokens, len(request.prompt)
        forecast = first_tokens.forecast(request.model, num_prompt, request.priority, now)
        refused = first_tokens.refusal(request, forecast, self.config.max_ttft_s, now)
        if refused is not None:
            self.registry.out.append((FRONT, refused))
            return
        model = self.registry.ledger.models.index(request.model)
        kv = self.registry.models[request.model]
        row = self.registry.view.requests.add(request, kv, model)
        record = Record(request, now, row, log=self.log_for(row), forecast=forecast)
        self.placement.add(record)

    def predicted_ttft_s(
        self, model: str, prompt_tokens: int, now: float, priority: int = 0
    ) -> float:
        """Expected seconds to the first token of a request that is submitted now.

        KeyError for a model that no worker has loaded so far.
        """
        first_tokens = self.placement.first_tokens
        return first_tokens.ttft_s(first_tokens.forecast(model, prompt_tokens, priority, now), now)

    def log_for(self, row: int) -> Log:
        """Return a token log for the request in this row of the view."""
        return TokenLog()

    def _cancel(self, request_id: int) -> None:
        if (record := self.records.get(request_id)) is None:
            return  # it has finished
        self.placement.release(record)
        self.placement.forget(record, "cancelled")

    # --- tokens ---------------------------------------------------------------------------------

    def _report(self, worker: int, report: StepReport) -> None:
        self.registry.report(worker, report)
        logprobs, records, tokens = dict(report.logprobs), self.records, report.tokens
        prompt_logprobs = dict(report.prompt_logprobs)
        runs = zip(report.request_ids, report.epochs, report.firsts, report.counts, strict=True)
        rows, added, end, now = [], [], 0, self.registry.view.now
        for i, (request_id, epoch, first, num_tokens) in enumerate(runs):
            start, end = end, end + num_tokens
            record = records.get(request_id)
            if record is not None and record.epoch == epoch:
                rows.append(record.slot)
                if record.completed_plan is not None:
                    self.handover.resumed(record)
                record.last_token_s = now
                rest = tokens[start:end], logprobs.get(i, ()), prompt_logprobs.get(i, ())
                added.append(self._tokens(record, first, *rest))
        if rows:
            self._count(rows, added)
        # After the runs, so that all tokens before a preemption are in the log.
        for request_id, epoch in report.preempted:
            record = self.records.get(request_id)
            if record is not None and record.epoch == epoch:
                self.registry.out.append((OBSERVER, Preempted(request_id, worker)))
                pinned_to = self.placement.pin_target(record, worker)
                self.placement.wait_again(record, "preempted", pinned_to)

    def _count(self, rows: list[int], added: list[int]) -> None:
        """Add output tokens to rows of the view; each row occurs once."""
        self.registry.view.requests.num_tokens[np.array(rows)] += np.array(added)

    def _tokens(
        self,
        record: Record,
        first: int,
        run: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        prompt_logprobs: tuple[PromptLogprob, ...] = (),
    ) -> int:
        """Log and emit the new part of a run; return its length, which the caller counts."""
        new = record.log.merge(first, run)
        if not new:
            return 0
        if record.moved_from is not None:
            self.handover.recomputed(record, "moved")
        self.registry.end_prefill(record)
        if record.forecast is not None:
            self.placement.first_tokens.first_token(record)
        request, outputs = record.request, record.log.tokens
        reason = finish_reason(request, outputs)
        if logprobs:
            logprobs = aligned(logprobs, len(run), len(new))
        first = len(outputs) - len(new)
        emit = Emit(request.id, first, new, logprobs, reason, prompt_logprobs)
        self.registry.out.append((FRONT, emit))
        if reason:
            self.registry.finished(len(outputs))
            self.placement.forget(record, "finished")
        return len(new)

    # --- proposals of the policy ----------------------------------------------------------------

    def _enact(self, proposals: list[Proposal]) -> None:
        """Carry out the proposals that are still possible; all moves are planned together."""
        for proposal in proposals:
            self.registry.apply(proposal)
        moves = [proposal for proposal in proposals if isinstance(proposal, MoveProposal)]
        self.moves.start(moves, self.config.migration_limit_s)

    # --- other events of workers ----------------------------------------------------------------

    def _answer(self, source: int, event: OfferAnswer) -> None:
        if (record := self.records.get(event.request_id)) is None:
            return
        if (received := self.handover.answer(record, source, event)) is not None:
            added = self._tokens(record, received.first, received.tokens, received.logprobs)
            self._count([record.slot], [added])

    def _worker_lost(self, worker: int) -> None:
        if worker in self._lost:
            return
        self._lost.add(worker)
        self.registry.lost(worker)
        self.placement.unpin(worker)
        # Each goes to the head of the queue: in reverse order, so that the oldest is first.
        for record in reversed(list(self.records.values())):
            if record.worker == worker and (why := record.owner_died()) is not None:
                self.placement.refuse(record, why)
            elif record.worker == worker:
                self.placement.wait_again(record, f"worker {worker} lost")
            elif record.offer is not None and record.offer.dst == worker:
                self.handover.destination_lost(record, f"worker {worker} lost")
