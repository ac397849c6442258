"""The idealised cluster: every request decodes at one rate, and nothing else takes time.

Time is a whole number of decode steps. A worker's KV grows linearly between events, so what is
next on it (an end, an overflow) is computed, not stepped to. Answers are those of BatchScheduler
with blocks of one token: on overflow the youngest request is preempted.
"""

import heapq
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
from mellmpi.scheduler import RequestColumns
from mellmpi.sim.progress import STOP, Progress, zeros

MANY = 1 << 30  # sequences: no bound


@dataclass(slots=True, eq=False)
class _Sequence:
    request_id: int
    epoch: int
    num_prompt: int
    token_bytes: int
    length: int  # tokens of the whole answer
    first: int  # outputs it had at step `start`
    start: int
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

    def __init__(
        self, hosts: list[tuple[ModelKv, ...]], capacity: int, rate: float, lengths: list[int]
    ):
        self.rate, self.lengths = rate, lengths
        self.step = 0
        self.workers = {w: _Worker(w, models, capacity) for w, models in enumerate(hosts, start=1)}
        self.busy = set(self.workers)  # those that may have something to report
        self._heap: list[tuple[int, int, int, int]] = []  # (step, worker, epoch or 0, version)
        # By request; with `step`, the outputs of all that decode are one sum.
        self._decodes = np.zeros(len(lengths), bool)
        self._on = np.zeros(len(lengths), np.int64)  # worker
        self._before = np.zeros(len(lengths), np.int64)  # outputs at step 0, had it decoded since
        self._reported = np.zeros(len(lengths), np.int64)  # outputs

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
            i = sequence.request_id
            self._decodes[i], self._on[i] = True, worker.id
            self._before[i] = sequence.first - sequence.start
            heapq.heappush(self._heap, (sequence.end, worker.id, sequence.epoch, 0))
        self._watch(worker)

    def _take(self, worker: _Worker, epoch: int) -> _Sequence:
        sequence = worker.sequences.pop(epoch)
        size, known = sequence.token_bytes, sequence.num_prompt + sequence.first
        worker.fixed -= size * (known - sequence.start)
        worker.growth -= size
        if not sequence.arriving:
            self._decodes[sequence.request_id] = False
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
                self.busy.discard(w)
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
        return WorkerReady(
            worker.models, worker.capacity, MANY, worker.acked, 0.0, MANY, None, (), ""
        )

    def _kv(self, worker: _Worker, model: str) -> int:
        return next(m.block_bytes for m in worker.models if m.model == model)

    def _sequence(self, worker: _Worker, order: Any, num_outputs: int) -> _Sequence:
        request = order.request
        return _Sequence(
            request.id,
            order.epoch,
            len(request.prompt),
            self._kv(worker, request.model),
            self.lengths[request.id],
            num_outputs,
            self.step,
        )

    def _assign(self, worker: _Worker, order: Assign) -> None:
        sequence = self._sequence(worker, order, len(order.outputs))
        self._reported[sequence.request_id] = sequence.first
        need = sequence.token_bytes * (sequence.num_prompt + sequence.first)
        if self.used(worker) + need > worker.capacity:
            worker.preempted.append((sequence, sequence.first))
        else:
            self._put(worker, sequence)

    def _reserve(self, worker: _Worker, order: ReceiveKv) -> KvReserved | KvRefused:
        sequence = self._sequence(worker, order, order.num_tokens - len(order.request.prompt))
        sequence.arriving = True
        if self.used(worker) + sequence.token_bytes * order.num_tokens > worker.capacity:
            return KvRefused(order.request.id, order.epoch)
        self._put(worker, sequence)
        return KvReserved(order.request.id, order.epoch, order.start)

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
        first, outputs = int(self._reported[order.request_id]), sequence.outputs(self.step)
        self._reported[order.request_id] = outputs
        num_bytes = sequence.token_bytes * (sequence.num_prompt + outputs)
        return [
            (
                order.dst,
                KvReceived(
                    order.request_id,
                    order.dst_epoch,
                    first,
                    zeros(outputs - first),
                    (),
                    num_bytes,
                    0.0,
                ),
            )
        ]

    # --- reports --------------------------------------------------------------------------------

    def report(self, w: int) -> StepReport | None:
        """What the scheduler has not heard of this worker; None if there is nothing."""
        worker, step = self.workers[w], self.step
        free = worker.capacity - self.used(worker)
        if not (worker.sequences or worker.ended or worker.preempted):
            self.busy.discard(w)
            if worker.said == (worker.acked, free):
                return None
        made = [(s, s.outputs(step)) for s in worker.sequences.values() if not s.arriving]
        told = self._reported.item  # plain numbers: these go into messages
        runs = [(s, told(s.request_id), n) for s, n in made + worker.preempted]
        runs = [run for run in runs if run[2] > run[1]]
        tokens = zeros(sum([n - first for _, first, n in runs]))
        for s in worker.ended:
            first = told(s.request_id)
            tokens += (*zeros(s.length - first - 1), STOP)
            runs.append((s, first, s.length))
        for s, _, n in runs:
            self._reported[s.request_id] = n
        preempted = tuple([(s.request_id, s.epoch) for s, _ in worker.preempted])
        worker.ended, worker.preempted, worker.said = [], [], (worker.acked, free)
        return StepReport(
            steps=1,
            step_s=1 / self.rate,
            prefill_tokens=0,
            decode_tokens=len(tokens),
            free_bytes=free,
            acked=worker.acked,
            request_ids=tuple([s.request_id for s, _, _ in runs]),
            epochs=tuple([s.epoch for s, _, _ in runs]),
            firsts=tuple([f for _, f, _ in runs]),
            counts=tuple([n - f for _, f, n in runs]),
            tokens=tokens,
            logprobs=(),
            preempted=preempted,
            attended=0,
        )

    def progress(self, requests: RequestColumns) -> Progress:
        """What all workers have decoded; who has ended or was preempted is for `report`."""
        step, busy = self.step, [self.workers[w] for w in sorted(self.busy)]
        rows = np.flatnonzero(requests.live & (requests.worker > 0))
        ids = requests.request_id[rows]
        decodes = self._decodes[ids]
        rows, ids = rows[decodes], ids[decodes]
        outputs = self._before[ids] + step
        new = np.bincount(self._on[ids], outputs - self._reported[ids], len(self.workers) + 1)
        self._reported[ids] = outputs
        free = [w.capacity - w.fixed - w.growth * step for w in busy]
        self.busy = {w.id for w in busy if w.sequences or w.ended or w.preempted}
        return Progress(
            np.array([w.id for w in busy], np.int64),
            np.array(free, np.int64),
            [w.acked for w in busy],
            new,
            rows,
            outputs,
        )
