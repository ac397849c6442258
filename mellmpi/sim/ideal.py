"""The idealised cluster: all requests decode at one rate, and nothing else takes time.

Time is a whole number of decode steps. A worker's KV grows linearly between events, so its next
event (an end, an overflow) is computed, without simulating the steps before it. The result is that
of BatchScheduler with blocks of one token: on overflow the youngest request is preempted.
"""

import heapq

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
    SchedulerEvent,
    SendKv,
    StepReport,
    Unfreeze,
    Wake,
    WorkerCommand,
    WorkerReady,
)
from mellmpi.scheduler import RequestColumns
from mellmpi.sim.ideal_worker import IdealSequence, IdealWorker
from mellmpi.sim.progress import STOP, Progress, zeros

UNLIMITED = 1 << 30  # sequences, positions per step


class IdealWorkers:
    """All workers of a cluster. `handle` takes the scheduler's commands, `advance` passes time."""

    def __init__(
        self, hosts: list[tuple[ModelKv, ...]], capacity: int, rate: float, lengths: list[int]
    ):
        self.rate, self.lengths = rate, lengths
        self.step = 0
        self.workers = {
            w: IdealWorker(w, models, capacity) for w, models in enumerate(hosts, start=1)
        }
        self.busy = set(self.workers)  # workers that may have news to report
        self._heap: list[tuple[int, int, int, int]] = []  # (step, worker, epoch or 0, version)
        # By request id: outputs of all decoding requests at a step are one vector sum.
        self._decodes = np.zeros(len(lengths), bool)
        self._on = np.zeros(len(lengths), np.int64)  # worker
        self._before = np.zeros(len(lengths), np.int64)  # outputs, extrapolated back to step 0
        self._reported = np.zeros(len(lengths), np.int64)  # outputs

    def next_step(self) -> int | None:
        """Return the step of the next end or overflow, or None."""
        while self._heap:
            step, worker, epoch, version = self._heap[0]
            if self._is_current(self.workers[worker], epoch, version):
                return step
            heapq.heappop(self._heap)
        return None

    def _is_current(self, worker: IdealWorker, epoch: int, version: int) -> bool:
        return epoch in worker.sequences if epoch else version == worker.version

    def advance(self, step: int) -> set[int]:
        """Let time pass up to `step`. Returns the workers with an end or an overflow."""
        touched: set[int] = set()
        self.step = step
        full: set[int] = set()
        while (at := self.next_step()) is not None and at <= step:
            _, w, epoch, _ = heapq.heappop(self._heap)
            worker = self.workers[w]
            touched.add(w)
            if epoch:
                worker.ended.append(self._remove(worker, epoch))
            full.add(w)
        for w in full:  # after all ends: a request that ends in this step cannot overflow
            self._make_room(self.workers[w])
        return touched

    # --- sequences ------------------------------------------------------------------------------

    def all_used(self) -> int:
        """Bytes in use on all workers."""
        return sum([self.workers[w].used(self.step) for w in self.busy])

    def _add(self, worker: IdealWorker, sequence: IdealSequence) -> None:
        worker.add(sequence)
        if not sequence.receiving:
            i = sequence.request_id
            self._decodes[i], self._on[i] = True, worker.id
            self._before[i] = sequence.first - sequence.start
            heapq.heappush(self._heap, (sequence.end, worker.id, sequence.epoch, 0))
        self._schedule_overflow(worker)

    def _remove(self, worker: IdealWorker, epoch: int) -> IdealSequence:
        sequence = worker.remove(epoch)
        if not sequence.receiving:
            self._decodes[sequence.request_id] = False
        self._schedule_overflow(worker)
        return sequence

    def _schedule_overflow(self, worker: IdealWorker) -> None:
        worker.version += 1
        if worker.growth:
            full = (worker.capacity - worker.fixed) // worker.growth + 1
            heapq.heappush(self._heap, (max(full, self.step), worker.id, 0, worker.version))

    def _make_room(self, worker: IdealWorker) -> None:
        while worker.used(self.step) > worker.capacity:
            epoch = next(reversed(worker.sequences))
            sequence = self._remove(worker, epoch)
            worker.preempted.append((sequence, sequence.outputs(self.step)))
        self._schedule_overflow(worker)

    # --- messages -------------------------------------------------------------------------------

    def handle(self, w: int, command: WorkerCommand) -> list[tuple[int, SchedulerEvent]]:
        """Handle one command of the scheduler. Returns the answers as (worker, message)."""
        worker = self.workers[w]
        worker.acked += 1
        self.busy.add(w)
        match command:
            case Assign():
                self._assign(worker, command)
            case Release(_, epoch):
                if epoch in worker.sequences:
                    self._remove(worker, epoch)
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

    def ready(self, worker: IdealWorker) -> WorkerReady:
        """Return the announcement of a worker that has started or woken."""
        worker.last_state = (-1, -1)
        return WorkerReady(
            worker.models,
            worker.capacity,
            UNLIMITED,
            worker.acked,
            0.0,
            UNLIMITED,
            None,
            (),
            "",
        )

    def _sequence(
        self, worker: IdealWorker, order: Assign | ReceiveKv, num_outputs: int
    ) -> IdealSequence:
        request = order.request
        return IdealSequence(
            request.id,
            order.epoch,
            len(request.prompt),
            worker.token_bytes(request.model),
            self.lengths[request.id],
            num_outputs,
            self.step,
        )

    def _assign(self, worker: IdealWorker, order: Assign) -> None:
        sequence = self._sequence(worker, order, len(order.outputs))
        self._reported[sequence.request_id] = sequence.first
        need = sequence.token_bytes * (sequence.num_prompt + sequence.first)
        if worker.used(self.step) + need > worker.capacity:
            worker.preempted.append((sequence, sequence.first))
        else:
            self._add(worker, sequence)

    def _reserve(self, worker: IdealWorker, order: ReceiveKv) -> KvReserved | KvRefused:
        sequence = self._sequence(worker, order, order.num_tokens - len(order.request.prompt))
        sequence.receiving = True
        if worker.used(self.step) + sequence.token_bytes * order.num_tokens > worker.capacity:
            return KvRefused(order.request.id, order.epoch)
        self._add(worker, sequence)
        return KvReserved(order.request.id, order.epoch, order.start)

    def _send(self, source: IdealWorker, order: SendKv) -> list[tuple[int, SchedulerEvent]]:
        """Move the sequence to its destination at once."""
        sent = source.sequences.get(order.epoch)
        if sent is None:
            return []
        self._remove(source, order.epoch)
        destination = self.workers[order.dst]
        sequence = self._remove(destination, order.dst_epoch)
        sequence.first, sequence.start, sequence.receiving = sent.first, sent.start, False
        self._add(destination, sequence)
        first, outputs = int(self._reported[order.request_id]), sequence.outputs(self.step)
        self._reported[order.request_id] = outputs
        received = KvReceived(
            order.request_id,
            order.dst_epoch,
            first,
            zeros(outputs - first),
            (),
            sequence.token_bytes * (sequence.num_prompt + outputs),
            0.0,
        )
        return [(order.dst, received)]

    # --- reports --------------------------------------------------------------------------------

    def report(self, w: int) -> StepReport | None:
        """Return the news of a worker since its last report; None if there is none."""
        worker, step = self.workers[w], self.step
        free = worker.capacity - worker.used(step)
        if not (worker.sequences or worker.ended or worker.preempted):
            self.busy.discard(w)
            if worker.last_state == (worker.acked, free):
                return None
        decoding = [(s, s.outputs(step)) for s in worker.sequences.values() if not s.receiving]
        reported = self._reported.item  # Python numbers: they become fields of messages
        runs = [(s, reported(s.request_id), n) for s, n in decoding + worker.preempted]
        runs = [run for run in runs if run[2] > run[1]]
        tokens = zeros(sum([n - first for _, first, n in runs]))
        for s in worker.ended:
            first = reported(s.request_id)
            tokens += (*zeros(s.length - first - 1), STOP)
            runs.append((s, first, s.length))
        for s, _, n in runs:
            self._reported[s.request_id] = n
        preempted = tuple([(s.request_id, s.epoch) for s, _ in worker.preempted])
        worker.ended, worker.preempted, worker.last_state = [], [], (worker.acked, free)
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
            cached=(),
            prompt_logprobs=(),
        )

    def progress(self, requests: RequestColumns) -> Progress:
        """Return the decode progress of all workers. Ends and preemptions stay for `report`."""
        step, busy = self.step, [self.workers[w] for w in sorted(self.busy)]
        rows = np.flatnonzero(requests.live & (requests.worker > 0))
        ids = requests.request_id[rows]
        decodes = self._decodes[ids]
        rows, ids = rows[decodes], ids[decodes]
        outputs = self._before[ids] + step
        new = np.bincount(self._on[ids], outputs - self._reported[ids], len(self.workers) + 1)
        self._reported[ids] = outputs
        free = [w.capacity - w.used(step) for w in busy]
        self.busy = {w.id for w in busy if w.sequences or w.ended or w.preempted}
        return Progress(
            np.array([w.id for w in busy], np.int64),
            np.array(free, np.int64),
            [w.acked for w in busy],
            new,
            rows,
            outputs,
        )
