"""The idealised cluster: every request decodes at one rate, and nothing else takes time.

Time is a whole number of decode steps. A worker's KV grows linearly between events, so what is
next on it (an end, an overflow) is computed, not stepped to. Answers are those of BatchScheduler
with blocks of one token: on overflow the youngest request is preempted.
"""

import heapq
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from mellmpi.protocol import (
    Assign,
    KvReceived,
    KvRefused,
    KvReserved,
    ModelKv,
    Park,
    Parked,
    ReceiveKv,
    Release,
    SendKv,
    StepReport,
    Unfreeze,
    Wake,
    WorkerReady,
)

STOP = 1  # the token that ends an answer; all others are 0
MANY = 1 << 30  # sequences: no bound


@lru_cache(maxsize=4096)
def zeros(n: int) -> tuple[int, ...]:
    """Shared, so that a thousand prompts of one length cost one."""
    return (0,) * n


@dataclass(slots=True, eq=False)
class _Sequence:
    request_id: int
    epoch: int
    num_prompt: int
    token_bytes: int
    length: int  # tokens of the whole answer
    first: int  # outputs it had at step `start`
    start: int
    reported: int
    arriving: bool = False

    def outputs(self, step: int) -> int:
        return self.first + step - self.start

    @property
    def end(self) -> int:
        return self.start + self.length - self.first


@dataclass(slots=True, eq=False)
class _Worker:
    """KV in use at step s is `fixed + growth * s` bytes, as long as nothing happens."""

    id: int
    models: tuple[ModelKv, ...]
    capacity: int
    sequences: dict[int, _Sequence] = field(default_factory=dict)  # by epoch, oldest first
    ended: list[_Sequence] = field(default_factory=list)  # unreported
    preempted: list[tuple[_Sequence, int]] = field(default_factory=list)  # with its outputs
    fixed: int = 0
    growth: int = 0
    acked: int = 0
    said: tuple[int, int] = (-1, -1)
    version: int = 0  # of its entry in the heap of overflows


class IdealWorkers:
    """All workers of a cell. `handle` takes the scheduler's commands, `advance` passes time."""

    def __init__(self, hosts: list[tuple[ModelKv, ...]], capacity: int, rate: float,
                 lengths: dict[int, int]):  # fmt: skip
        self.rate, self.lengths = rate, lengths
        self.step = 0
        self.workers = {w: _Worker(w, models, capacity) for w, models in enumerate(hosts, start=1)}
        self.busy = set(self.workers)  # those that may have something to report
        self._heap: list[tuple[int, int, int, int]] = []  # (step, worker, epoch or 0, version)

    def next_step(self) -> int | None:
        """When something happens by itself."""
        while self._heap:
            step, worker, epoch, version = self._heap[0]
            if self._is_current(self.workers[worker], epoch, version):
                return step
            heapq.heappop(self._heap)
        return None

    def _is_current(self, worker: _Worker, epoch: int, version: int) -> bool:
        return epoch in worker.sequences if epoch else version == worker.version

    def advance(self, step: int) -> set[int]:
        """Let time pass up to `step`; the workers where something has happened."""
        touched: set[int] = set()
        self.step = step
        full: set[int] = set()
        while (at := self.next_step()) is not None and at <= step:
            _, w, epoch, _ = heapq.heappop(self._heap)
            worker = self.workers[w]
            touched.add(w)
            if epoch:
                worker.ended.append(self._take(worker, epoch))
            full.add(w)
        for w in full:  # only now: who ends in this step does not overflow in it
            self._make_room(self.workers[w])
        return touched

    # --- sequences ------------------------------------------------------------------------------

    def used(self, worker: _Worker) -> int:
        return worker.fixed + worker.growth * self.step

    def all_used(self) -> int:
        """Bytes in use on all workers."""
        return sum([self.used(self.workers[w]) for w in self.busy])

    def _put(self, worker: _Worker, sequence: _Sequence) -> None:
        worker.sequences[sequence.epoch] = sequence
        size, known = sequence.token_bytes, sequence.num_prompt + sequence.first
        worker.fixed += size * (known - sequence.start)
        worker.growth += size
        if not sequence.arriving:
            heapq.heappush(self._heap, (sequence.end, worker.id, sequence.epoch, 0))
        self._watch(worker)

    def _take(self, worker: _Worker, epoch: int) -> _Sequence:
        sequence = worker.sequences.pop(epoch)
        size, known = sequence.token_bytes, sequence.num_prompt + sequence.first
        worker.fixed -= size * (known - sequence.start)
        worker.growth -= size
        self._watch(worker)
        return sequence

    def _watch(self, worker: _Worker) -> None:
        worker.version += 1
        if worker.growth:
            full = (worker.capacity - worker.fixed) // worker.growth + 1
            heapq.heappush(self._heap, (max(full, self.step), worker.id, 0, worker.version))

    def _make_room(self, worker: _Worker) -> None:
        while self.used(worker) > worker.capacity:
            epoch = next(reversed(worker.sequences))
            sequence = self._take(worker, epoch)
            worker.preempted.append((sequence, sequence.outputs(self.step)))
        self._watch(worker)

    # --- messages -------------------------------------------------------------------------------

    def handle(self, w: int, command: Any) -> list[tuple[int, Any]]:
        """One command of the scheduler; the answers, as (worker, message)."""
        worker = self.workers[w]
        worker.acked += 1
        self.busy.add(w)
        match command:
            case Assign():
                self._assign(worker, command)
            case Release(_, epoch):
                if epoch in worker.sequences:
                    self._take(worker, epoch)
            case ReceiveKv():
                return [(w, self._reserve(worker, command))]
            case SendKv():
                return self._send(worker, command)
            case Park():
                return [(w, Parked(worker.acked))]
            case Wake():
                return [(w, self.ready(worker))]
            case Unfreeze():
                pass
            case _:
                raise TypeError(command)
        return []

    def ready(self, worker: _Worker) -> WorkerReady:
        worker.said = (-1, -1)
        return WorkerReady(worker.models, worker.capacity, MANY, worker.acked, 0.0)

    def _kv(self, worker: _Worker, model: str) -> int:
        return next(m.block_bytes for m in worker.models if m.model == model)

    def _sequence(self, worker: _Worker, order: Any, num_outputs: int) -> _Sequence:
        request = order.request
        return _Sequence(
            request.id, order.epoch, len(request.prompt), self._kv(worker, request.model),
            self.lengths[request.id], num_outputs, self.step, num_outputs,
        )  # fmt: skip

    def _assign(self, worker: _Worker, order: Assign) -> None:
        sequence = self._sequence(worker, order, len(order.outputs))
        need = sequence.token_bytes * (sequence.num_prompt + sequence.first)
        if self.used(worker) + need > worker.capacity:
            worker.preempted.append((sequence, sequence.first))
        else:
            self._put(worker, sequence)

    def _reserve(self, worker: _Worker, order: ReceiveKv) -> KvReserved | KvRefused:
        sequence = self._sequence(worker, order, order.num_tokens - len(order.request.prompt))
        sequence.reported = order.num_logged
        sequence.arriving = True
        if self.used(worker) + sequence.token_bytes * order.num_tokens > worker.capacity:
            return KvRefused(order.request.id, order.epoch)
        self._put(worker, sequence)
        return KvReserved(order.request.id, order.epoch)

    def _send(self, source: _Worker, order: SendKv) -> list[tuple[int, Any]]:
        """The KV is there at once; the source has nothing left to hold."""
        sent = source.sequences.get(order.epoch)
        if sent is None:
            return []
        self._take(source, order.epoch)
        destination = self.workers[order.dst]
        sequence = self._take(destination, order.dst_epoch)
        sequence.first, sequence.start, sequence.arriving = sent.first, sent.start, False
        self._put(destination, sequence)
        first, outputs = sequence.reported, sequence.outputs(self.step)
        sequence.reported = outputs
        num_bytes = sequence.token_bytes * (sequence.num_prompt + outputs)
        return [(order.dst, KvReceived(
            order.request_id, order.dst_epoch, first, zeros(outputs - first), (), num_bytes, 0.0,
        ))]  # fmt: skip

    # --- reports --------------------------------------------------------------------------------

    def report(self, w: int) -> StepReport | None:
        """What the scheduler has not heard of this worker; None if there is nothing."""
        worker, step = self.workers[w], self.step
        free = worker.capacity - self.used(worker)
        if not (worker.sequences or worker.ended or worker.preempted):
            self.busy.discard(w)
            if worker.said == (worker.acked, free):
                return None
        runs = [(s, s.first + step - s.start) for s in worker.sequences.values() if not s.arriving]
        runs += worker.preempted
        runs = [(s, n) for s, n in runs if n > s.reported]
        tokens = zeros(sum([n - s.reported for s, n in runs]))
        for s in worker.ended:
            tokens += (*zeros(s.length - s.reported - 1), STOP)
            runs.append((s, s.length))
        preempted = tuple([(s.request_id, s.epoch) for s, _ in worker.preempted])
        report = self._report(worker, free, tokens, runs, preempted)
        for s, n in runs:
            s.reported = n
        worker.ended, worker.preempted, worker.said = [], [], (worker.acked, free)
        return report

    def room(self, w: int) -> StepReport:
        """How much is free on this worker; nothing of its requests, which is for `report`."""
        worker = self.workers[w]
        return self._report(worker, worker.capacity - self.used(worker), (), [], ())

    def _report(self, worker: _Worker, free: int, tokens: tuple[int, ...],
                runs: list[tuple[_Sequence, int]],
                preempted: tuple[tuple[int, int], ...]) -> StepReport:  # fmt: skip
        return StepReport(
            steps=1, step_s=1 / self.rate, prefill_tokens=0, decode_tokens=len(tokens),
            free_bytes=free, acked=worker.acked,
            request_ids=tuple([s.request_id for s, _ in runs]),
            epochs=tuple([s.epoch for s, _ in runs]), firsts=tuple([s.reported for s, _ in runs]),
            counts=tuple([n - s.reported for s, n in runs]), tokens=tokens, logprobs=(),
            preempted=preempted,
        )  # fmt: skip
