"""Rank 0's mind: which request is where, and what must be done next. Pure.

Events come in, commands go out; time is an argument. The transition table is that of
docs/design.md; every change of a request's state is one call of `Record.move`.
"""

from itertools import count
from typing import Any

from mellmpi.config import ClusterConfig
from mellmpi.core.fleet import Commands, Fleet
from mellmpi.core.ledger import WorkerState
from mellmpi.core.migration import cheaper_mode
from mellmpi.core.policies import Policy
from mellmpi.core.queue import WaitingQueue
from mellmpi.core.requests import Offer, Record, State, aligned, finish_reason
from mellmpi.core.view import Drain, Move, ParkWorker, Proposal, WakeWorker, kv_need
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
    MigrationEnded,
    MigrationStarted,
    Parked,
    Preempted,
    ReceiveKv,
    Rejected,
    Release,
    Request,
    SendKv,
    StepReport,
    Submit,
    TokenLogprob,
    Unfreeze,
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
        self._epochs = count(1)
        self._next_tick_s = 0.0

    def handle(self, source: Address, event: Any, now: float) -> Commands:
        """Apply one event; return what must be sent because of it."""
        self.fleet.view.now = now
        match event:
            case StepReport():
                self._report(int(source), event, now)
            case Submit(request):
                self._submit(request, now)
            case Cancel(request_id):
                self._cancel(request_id)
            case WorkerReady():
                self.fleet.ready(int(source), event)
            case Parked():
                self.fleet.parked(int(source), event)
            case WorkerLost(worker):
                self._worker_lost(worker)
            case _:
                self._ring(int(source), event, now)
        if self.queue:
            self._place_waiting(now)
        return self.fleet.take()

    def tick(self, now: float) -> Commands:
        """Let the policy act, at most once in `rebalance_every_s`."""
        if now < self._next_tick_s:
            return []
        self._next_tick_s = now + self.config.rebalance_every_s
        view = self.fleet.view
        view.now, view.waiting_bytes = now, self.queue.kv_bytes
        self.fleet.tick(now)
        for proposal in self.policy.rebalance(view):
            self._enact(proposal, now)
        for worker in self.fleet.ledger.workers(WorkerState.DRAINING):
            self.fleet.park(worker)
        return self.fleet.take()

    # --- a request comes and goes ---------------------------------------------------------------

    def _submit(self, request: Request, now: float) -> None:
        assert request.id not in self.records, f"request {request.id} submitted twice"
        kv = self.fleet.models.get(request.model)
        if kv is None or (why := self._too_long(request)):
            reason = why if kv else f"no worker serves the model {request.model}"
            self.fleet.out.append((FRONT, Rejected(request.id, reason)))
            return
        row = self.fleet.view.requests.add(request, now, kv)
        record = Record(request, now, row)
        self.records[request.id] = record
        self.queue.append(record, self._kv_bytes(record))

    def _too_long(self, request: Request) -> str:
        # The last token is never read again: it needs no KV.
        num_tokens = len(request.prompt) + request.sampling.max_tokens - 1
        need = kv_need(self.fleet.models[request.model], num_tokens)
        room = self.fleet.largest_capacity()
        if need <= room:
            return ""
        return f"prompt and max_tokens need {need} bytes of KV cache; a worker has {room}"

    def _cancel(self, request_id: int) -> None:
        if (record := self.records.get(request_id)) is None:
            return  # it finished meanwhile
        if record.worker is not None:
            self.fleet.send(record.worker, Release(request_id, record.epoch or 0))
        self._forget(record, "cancelled")

    def _forget(self, record: Record, outcome: str) -> None:
        """The request is over: nothing of it stays on rank 0, nor at a destination."""
        self._withdraw(record, outcome)
        self._leave(record)
        self.queue.remove(record)
        del self.records[record.request.id]
        self.fleet.view.requests.drop(record.slot)

    def _own(self, record: Record, worker: int, epoch: int, now: float) -> None:
        record.worker, record.epoch = worker, epoch
        requests = self.fleet.view.requests
        requests.worker[record.slot], requests.placed_s[record.slot] = worker, now
        requests.movable[record.slot] = False  # until the new owner has produced a token

    def _leave(self, record: Record) -> None:
        """It has no owner from here on."""
        if record.worker is not None:
            self.fleet.ledger.remove(record.worker, self.fleet.view.now)
        record.worker = record.epoch = None
        requests = self.fleet.view.requests
        requests.worker[record.slot], requests.movable[record.slot] = 0, False

    # --- tokens ---------------------------------------------------------------------------------

    def _report(self, worker: int, report: StepReport, now: float) -> None:
        self.fleet.report(worker, report)
        logprobs = dict(report.logprobs)
        runs = zip(report.request_ids, report.epochs, report.firsts, report.counts, strict=True)
        end = 0
        for i, (request_id, epoch, first, num_tokens) in enumerate(runs):
            start, end = end, end + num_tokens
            record = self.records.get(request_id)
            if record is not None and record.epoch == epoch:
                self._tokens(record, first, report.tokens[start:end], logprobs.get(i, ()))
        for request_id, epoch in report.preempted:
            record = self.records.get(request_id)
            if record is not None and record.epoch == epoch:
                self.fleet.out.append((OBSERVER, Preempted(request_id, worker)))
                self._wait_again(record, "preempted")

    def _tokens(self, record: Record, first: int, run: tuple[int, ...],
                logprobs: tuple[TokenLogprob, ...]) -> None:  # fmt: skip
        new = record.log.merge(first, run)
        if not new:
            return
        if record.moved_from is not None:
            self._recomputed(record, "moved")
        outputs = record.log.tokens
        self.fleet.view.requests.num_tokens[record.slot] += len(new)
        self.fleet.view.requests.movable[record.slot] = record.state is State.RUNNING
        reason = finish_reason(record.request, outputs)
        emit = Emit(record.request.id, len(outputs) - len(new), new,
                    aligned(logprobs, len(run), len(new)), reason)  # fmt: skip
        self.fleet.out.append((FRONT, emit))
        if reason:
            self._forget(record, "finished")

    # --- placement ------------------------------------------------------------------------------

    def _place_waiting(self, now: float) -> None:
        """Place the queue from its head, until one fits nowhere."""
        while self.queue:
            record = self.queue.head()
            worker = self.policy.place(self.fleet.view, record.slot, record.request.model)
            if worker is None:
                if self.fleet.undrain():
                    continue
                return self.fleet.wake_for(self.queue.kv_bytes)
            self._assign(record, worker, now)
            self.queue.remove(record)

    def _assign(self, record: Record, worker: int, now: float) -> None:
        epoch = next(self._epochs)
        self._own(record, worker, epoch, now)
        record.move(State.RUNNING, f"assigned to {worker} under {epoch}")
        self.fleet.ledger.add(worker)
        order = Assign(record.request, epoch, tuple(record.log.tokens))
        self.fleet.send(worker, order, self._kv_bytes(record))

    def _kv_bytes(self, record: Record) -> int:
        return kv_need(self.fleet.models[record.request.model], record.num_tokens)

    def _wait_again(self, record: Record, why: str) -> None:
        """The owner has lost it, or given it back: first in the queue."""
        self._withdraw(record, why)
        self._leave(record)
        record.move(State.WAITING, why)
        self.queue.prepend(record, self._kv_bytes(record))

    # --- migration ------------------------------------------------------------------------------

    def _enact(self, proposal: Proposal, now: float) -> None:
        """Do what the policy wants, if it still can be done."""
        ledger = self.fleet.ledger
        match proposal:
            case Move():
                self._move(proposal, now)
            case Drain(worker) if ledger.state[worker] == WorkerState.ACTIVE:
                self.fleet.change(worker, WorkerState.DRAINING)
            case ParkWorker(worker):
                self.fleet.park(worker)
            case WakeWorker(worker):
                self.fleet.wake(worker)

    def _move(self, move: Move, now: float) -> None:
        record = self.records.get(move.request_id)
        if record is None or record.worker == move.dst:
            return
        if not self.fleet.view.requests.movable[record.slot]:
            return
        ledger, num_bytes = self.fleet.ledger, self._kv_bytes(record)
        if ledger.state[move.dst] != WorkerState.ACTIVE or ledger.budget[move.dst] < num_bytes:
            return
        mode = move.mode or cheaper_mode(record.num_tokens, num_bytes, self.fleet.cost)
        mode = "recompute" if record.transfer_failed else mode
        started = MigrationStarted(
            record.request.id, mode, record.worker or 0, move.dst, move.reason
        )
        self.fleet.out.append((OBSERVER, started))
        begin = self._recompute if mode == "recompute" else self._offer
        begin(record, move, num_bytes, now)

    def _recompute(self, record: Record, move: Move, num_bytes: int, now: float) -> None:
        src = record.worker
        self.fleet.send(src or 0, Release(record.request.id, record.epoch or 0))
        self._withdraw(record, "moved again")
        self._leave(record)
        record.move(State.WAITING, f"recompute at {move.dst}: {move.reason}")
        record.moved_from = src
        self._assign(record, move.dst, now)

    def _offer(self, record: Record, move: Move, num_bytes: int, now: float) -> None:
        offer = Offer(move.dst, next(self._epochs), move.reason, start=0)
        record.move(State.RESERVING, f"offered to {offer.dst} under {offer.epoch}: {move.reason}")
        record.offer = offer
        self.fleet.view.requests.movable[record.slot] = False
        self.fleet.ledger.add(offer.dst)
        order = ReceiveKv(
            record.request, offer.epoch, record.worker or 0,
            len(record.log.tokens), record.num_tokens, offer.start,
        )  # fmt: skip
        self.fleet.send(offer.dst, order, num_bytes)

    def _ring(self, source: int, event: Any, now: float) -> None:
        """An answer of a destination. Of an offer that has ended it is dropped."""
        record = self.records.get(event.request_id)
        if record is None or record.offer is None or record.offer.epoch != event.epoch:
            return
        offer = record.offer
        match event, record.state:
            case KvReserved(), State.RESERVING:
                record.move(State.SENDING, f"{offer.dst} has room")
                order = SendKv(
                    record.request.id, record.epoch or 0, offer.dst, offer.epoch, offer.start
                )
                self.fleet.send(record.worker or 0, order)
            case KvRefused(), State.RESERVING:
                self._stay(record, "refused")
            case KvReceived(), State.SENDING:
                self._received(record, offer, event, now)
            case KvFailed(), State.SENDING:
                record.transfer_failed = True
                self._thaw(record)
                self._stay(record, "failed")
            case _:
                raise record.bug(f"{event} from worker {source}")

    def _received(self, record: Record, offer: Offer, event: KvReceived, now: float) -> None:
        src, src_epoch = record.worker or 0, record.epoch or 0
        self.fleet.send(src, Release(record.request.id, src_epoch))
        self.fleet.ledger.remove(src, now)
        self._own(record, offer.dst, offer.epoch, now)
        record.offer = None
        record.move(State.RUNNING, f"received by {offer.dst}")
        self.fleet.cost = self.fleet.cost.after_transfer(event.num_bytes, event.transfer_s)
        self._ended(record, "transfer", src, offer.dst, "moved", event)
        self._tokens(record, event.first, event.tokens, event.logprobs)

    def _thaw(self, record: Record) -> None:
        self.fleet.send(record.worker or 0, Unfreeze(record.request.id, record.epoch or 0))

    def _stay(self, record: Record, outcome: str) -> None:
        """The move came to nothing, the destination knows it; the owner keeps the request."""
        self._close_offer(record, outcome)
        record.move(State.RUNNING, outcome)
        self.fleet.view.requests.movable[record.slot] = True

    def _withdraw(self, record: Record, outcome: str) -> None:
        """If it is on the move, that is over: the destination lets go of what it reserved."""
        if (offer := record.offer) is not None:
            self.fleet.send(offer.dst, Release(record.request.id, offer.epoch))
            self._close_offer(record, outcome)
        if record.moved_from is not None:
            self._recomputed(record, outcome)

    def _close_offer(self, record: Record, outcome: str) -> None:
        assert record.offer is not None
        self.fleet.ledger.remove(record.offer.dst, self.fleet.view.now)
        self._ended(record, "transfer", record.worker or 0, record.offer.dst, outcome, None)
        record.offer = None

    def _recomputed(self, record: Record, outcome: str) -> None:
        src, record.moved_from = record.moved_from, None
        self._ended(record, "recompute", src or 0, record.worker or 0, outcome, None)

    def _ended(self, record: Record, mode: str, src: int, dst: int, outcome: str,
               received: KvReceived | None) -> None:  # fmt: skip
        num_bytes, transfer_s = (
            (received.num_bytes, received.transfer_s) if received is not None else (0, 0.0)
        )
        ended = MigrationEnded(record.request.id, mode, src, dst, num_bytes, transfer_s, outcome)
        self.fleet.out.append((OBSERVER, ended))

    # --- a worker is lost -----------------------------------------------------------------------

    def _worker_lost(self, worker: int) -> None:
        self.fleet.lost(worker)
        # Last first, each to the head of the queue: they wait in the order they came in.
        for record in reversed(list(self.records.values())):
            if record.worker == worker:
                self._wait_again(record, f"worker {worker} lost")
            elif record.offer is not None and record.offer.dst == worker:
                if record.state is State.SENDING:
                    self._thaw(record)
                self._stay(record, f"worker {worker} lost")
        if not self.fleet.any_left():
            for record in list(self.records.values()):
                self.fleet.out.append((FRONT, Rejected(record.request.id, "no worker is left")))
                self._forget(record, "no worker is left")
