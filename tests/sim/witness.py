"""Counts the rows of the transition table and the special cases that a history covers."""

import re
from collections import Counter
from typing import Any

from mellmpi.protocol import (
    ROUNDS,
    Address,
    Assign,
    BlocksArrived,
    DrainBlocks,
    KvFailed,
    KvPayload,
    KvReceived,
    KvRefused,
    KvReserved,
    MigrationStarted,
    OperatorAnswer,
    Park,
    Parked,
    PartComputed,
    ReceiveKv,
    Release,
    SchedulerEvent,
    Unfreeze,
    Wake,
    WorkerEvent,
    WorkerLost,
)
from mellmpi.scheduler.requests import Record
from mellmpi.sim import Simulation, SimWorker
from mellmpi.worker import BlockResult
from mellmpi.worker.sequences import Phase

# As in `Record.transitions`: state -> state: why. tests/scheduler/test_transition_table.py checks
# the commands of each row.
ROWS = {
    "waiting -> running: assigned",
    "running -> reserving: offered",
    "running -> waiting: recompute",
    "reserving -> sending: has room",
    "reserving -> running: refused",
    "sending -> running: received",
    "sending -> running: failed",
    "running -> waiting: preempted",
    "reserving -> waiting: preempted",
    "sending -> waiting: preempted",
    "running -> waiting: worker lost",
    "reserving -> waiting: worker lost",
    "sending -> waiting: worker lost",
    "reserving -> running: worker lost",
    "sending -> running: worker lost",
    "running -> gone: finished",
    "reserving -> gone: finished",
    "sending -> gone: finished",
    "waiting -> gone: cancelled",
    "running -> gone: cancelled",
    "reserving -> gone: cancelled",
    "sending -> gone: cancelled",
}
CASES = {
    "Park",
    "Wake",
    "Unfreeze",
    "blocks drained",
    "transfer in mid-prefill",
    "transfer of nothing",
    "two workers lost",
    "prefix reused",
    "arrived without room",
    "transfer failed",
    "blocks freed late",
    "logprobs in KvReceived",
    "tokens only in KvReceived",
    "stale answer",
    "models alternate",
    "transfer to a worker with other models",
    "two rounds",
    "three rounds or more",
    "a later round drained",
    "no room in a later round",
    "a later round failed",
    "a wrong checksum",
    "ended during its migration",
    "aborted before the freeze",
    "split",
    "split with outputs",
    "own part complete after the transfer",
    "split released while computing its part",
    "prefix known at the destination",
    "last round empty",
    "decoded during its migration",
    "PartComputed",
    "PartComputed after the migration",
    "PartComputed with announced blocks",
    "DrainWorker",
    "UndrainWorker",
    "MoveRequest",
    "DrainWorker refused",
    "UndrainWorker refused",
    "MoveRequest refused",
    "started: operator",
    "started: drained by an operator",
    "parked while held",
    "a held worker lost",
}

_WHY = re.compile(r"(\w+ -> \w+: )(?:\d+ )?([a-z]+(?: (?:room|\d+ lost))?)")


def _row(line: str) -> str:
    found = _WHY.match(line)
    assert found is not None, line
    return found[1] + re.sub(r" \d+", "", found[2])


class Witness(Simulation):
    """A simulation that counts the rows and cases that it goes through."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.seen: Counter[str] = Counter()
        self._lost: set[int] = set()
        self._epochs: set[int] = set()  # of sequences seen
        self._sent_at: dict[
            int, int
        ] = {}  # request -> computed positions at its last round but one
        self._last_model: dict[int, str] = {}  # of the last step, by worker
        placement = self.scheduler.placement
        self._forget, placement.forget = placement.forget, self._ended

    def _ended(self, record: Record, outcome: str) -> None:
        """Count the transitions of a request that ends."""
        self.seen.update(_row(line) for line in record.transitions)
        self.seen[f"{record.state.value} -> gone: {outcome}"] += 1
        self._forget(record, outcome)

    def _to_scheduler(self, source: Address, event: SchedulerEvent) -> None:
        ledger = self.scheduler.registry.ledger
        match event:
            case Parked():
                self.seen["parked while held"] += bool(ledger.held[int(source)])
            case WorkerLost(worker):
                self.seen["a held worker lost"] += bool(ledger.held[worker])
                self._lost.add(worker)
                self.seen["two workers lost"] += len(self._lost) > 1
            case KvFailed(reason=reason):
                no_room = reason.startswith("no room")
                self.seen["arrived without room" if no_room else "transfer failed"] += 1
            case KvReceived(request_id, first=first, tokens=tokens, logprobs=logprobs):
                record = self.scheduler.records.get(request_id)
                news = record is not None and first + len(tokens) > len(record.log.tokens)
                self.seen["tokens only in KvReceived"] += news
                self.seen["logprobs in KvReceived"] += bool(logprobs)
        if isinstance(event, KvReserved | KvRefused | KvReceived | KvFailed):
            record = self.scheduler.records.get(event.request_id)
            current = record is not None and record.offer and record.offer.epoch == event.epoch
            self.seen["stale answer"] += not current
        super()._to_scheduler(source, event)

    def _route(self, source: Address, commands: list[tuple[Address, Any]]) -> None:
        failed = [c for _, c in commands if isinstance(c, KvFailed)]
        held = self.scheduler.registry.ledger.held
        for to, command in commands:
            assert not isinstance(command, Assign | ReceiveKv | Wake) or not held[int(to)]
            match command:
                case OperatorAnswer(asked, error):
                    self.seen[type(asked).__name__ + (" refused" if error else "")] += 1
                case MigrationStarted(reason=reason) if "operator" in reason:
                    self.seen[f"started: {reason}"] += 1
                case Park() | Wake() | Unfreeze():
                    self.seen[type(command).__name__] += 1
                case DrainBlocks(tag=tag):
                    self.seen["blocks drained"] += 1
                    later = tag % ROUNDS > 0
                    self.seen["a later round drained"] += later and not failed
                    self.seen["no room in a later round"] += later and bool(failed)
                case KvReserved(request_id, _, start):
                    record = self.scheduler.records.get(request_id)
                    asked = record.offer.start if record and record.offer else start
                    self.seen["prefix known at the destination"] += start > asked
                case ReceiveKv(start=start, outputs=outputs):
                    self.seen["split"] += start > 0
                    self.seen["split with outputs"] += start > 0 and bool(outputs)
                case KvPayload():
                    self._header(command)
                    self._compare_models(source, to)
        super()._route(source, commands)

    def _compare_models(self, src: Address, dst: Address) -> None:
        models = [{kv.model for kv in self.workers[int(w)].spec.models} for w in (src, dst)]
        self.seen["transfer to a worker with other models"] += models[0] != models[1]

    def _header(self, header: KvPayload) -> None:
        rounds = header.tag % ROUNDS + 1
        if header.last:
            self.seen["two rounds"] += rounds == 2
            self.seen["three rounds or more"] += rounds > 2
            self.seen["last round empty"] += rounds > 1 and not header.num_blocks
        else:
            self._sent_at[header.request_id] = header.num_computed
        record = self.scheduler.records.get(header.request_id)
        if header.last and header.num_computed > self._sent_at.pop(header.request_id, 10**9):
            self.seen["decoded during its migration"] += 1
        if not header.num_blocks:
            self.seen["transfer of nothing"] += not header.num_computed
        elif record and header.num_computed < len(record.request.prompt) + len(header.outputs) - 1:
            self.seen["transfer in mid-prefill"] += 1

    def _block_result(self, worker: SimWorker, event: BlockResult) -> None:
        if isinstance(event, BlocksArrived) and not event.ok:
            self.seen["a later round failed"] += event.round % ROUNDS > 0
            self.seen["a wrong checksum"] += event.reason == "checksum"
        super()._block_result(worker, event)

    def _to_worker(self, worker: SimWorker, source: Address, message: WorkerEvent) -> None:
        sequence = worker.batch.sequences.get(getattr(message, "epoch", 0))
        if sequence is not None:
            migrates = sequence.outgoing is not None and sequence.phase is Phase.RUNNING
            self.seen["aborted before the freeze"] += isinstance(message, Unfreeze) and migrates
            released = isinstance(message, Release) and sequence.incoming is not None
            self.seen["split released while computing its part"] += released and sequence.computable
        if isinstance(message, PartComputed):
            outgoing = [
                s.outgoing for s in worker.batch.sequences.values() if s.outgoing is not None
            ]
            waits = any(o.dst_epoch == message.epoch and o.awaits_part for o in outgoing)
            self.seen["PartComputed with announced blocks"] += worker.batch._sender.has_announced
            self.seen["PartComputed" if waits else "PartComputed after the migration"] += 1
        super()._to_worker(worker, source, message)

    def _step_done(self, worker: SimWorker, step_s: float) -> None:
        before = {s.epoch for s in worker.batch.sequences.values() if s.incoming is not None}
        super()._step_done(worker, step_s)
        now = [s for s in worker.batch.sequences.values() if s.epoch in before]
        self.seen["own part complete after the transfer"] += any(s.incoming is None for s in now)

    def _between_steps(self, worker: SimWorker) -> None:
        before = self._last_model.get(worker.id)
        super()._between_steps(worker)
        if worker.plan is not None:
            models = {s.request.model for s in worker.batch.sequences.values()}
            self.seen["models alternate"] += before in models - {worker.plan.model}
            self._last_model[worker.id] = worker.plan.model
        lingering = worker.batch.lingering.values()
        self.seen["blocks freed late"] += bool(lingering)
        self.seen["ended during its migration"] += any(
            s.outgoing is not None and s.phase is Phase.RUNNING for s in lingering
        )
        for sequence in worker.batch.sequences.values():
            if sequence.epoch not in self._epochs:  # new: nothing is computed yet
                self._epochs.add(sequence.epoch)
                self.seen["prefix reused"] += (
                    sequence.incoming is None and sequence.num_computed > 0
                )
