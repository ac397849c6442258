"""A worker that answers as BatchScheduler does, and makes many steps at once.

Tokens and blocks are counted, not stored. As long as nobody ends, needs prefill, overflows or
writes to the worker, all steps are alike: a `Stretch` of them is one event. What a plan does is
BatchScheduler.plan on counts; a property test holds the two together.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from mellmpi.config import BatchConfig
from mellmpi.core.cost import CostModel
from mellmpi.core.sequences import Phase
from mellmpi.protocol import (
    Assign,
    KvFailed,
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
from mellmpi.sim.counted import FastSequence, Sending, Stretch
from mellmpi.sim.progress import STOP, zeros


@dataclass(eq=False)
class FastWorker:
    """One worker between its steps. `plan` begins a stretch, `advance` takes steps of it in."""

    id: int
    models: tuple[ModelKv, ...]
    capacity: int  # bytes
    limits: BatchConfig
    cost: CostModel
    lengths: list[int]  # of the answers, by request id
    acked: int = 0
    sequences: dict[int, FastSequence] = field(default_factory=dict)  # by epoch, oldest first
    lingering: dict[int, FastSequence] = field(default_factory=dict)  # ended, but in flight
    stretch: Stretch | None = None

    def __post_init__(self) -> None:
        self.used = 0  # bytes
        self._kv = {kv.model: kv for kv in self.models}
        self._turns = [kv.model for kv in self.models]  # who computed last comes last
        self._parking = False
        self._said = (0, 0)
        self.ended: list[FastSequence] = []  # unreported, as all of these
        self.preempted: list[FastSequence] = []
        self.steps, self.step_s, self.prefill, self.decode = 0, 0.0, 0, 0

    @property
    def free(self) -> int:
        return self.capacity - self.used

    # --- messages -------------------------------------------------------------------------------

    def handle(self, event: Any) -> list[Any]:
        """One command of the scheduler: the answers, and what is to be sent (`Sending`)."""
        assert self.stretch is None, f"{event} during a step"
        self.acked += 1
        answers = self._handle(event)
        return answers + self._parked()

    def _handle(self, event: Any) -> list[Any]:
        match event:
            case Assign():
                self._assign(event)
            case Release(_, epoch):
                if epoch in self.sequences:
                    self._end(self.sequences[epoch])
            case ReceiveKv():
                return [self._reserve(event)]
            case SendKv():
                return self._send(event)
            case Unfreeze(_, epoch):
                if epoch in self.sequences:
                    self.sequences[epoch].phase = Phase.RUNNING
            case Park():
                self._parking = True
            case Wake():
                pass  # the driver says when it is over
            case _:
                raise TypeError(event)
        return []

    def _parked(self) -> list[Any]:
        if self._parking and not self.sequences and not self.lingering:
            self._parking = False
            return [Parked(self.acked)]
        return []

    def _sequence(self, order: Any, outputs: int, told: int) -> FastSequence:
        request = order.request
        length = min(self.lengths[request.id], request.sampling.max_tokens)
        return FastSequence(request.id, order.epoch, self._kv[request.model], len(request.prompt),
                            length, outputs, told)  # fmt: skip

    def _assign(self, order: Assign) -> None:
        sequence = self._sequence(order, len(order.outputs), len(order.outputs))
        self.sequences[order.epoch] = sequence
        if not self._grow(sequence, sequence.known):
            self._preempt(sequence)

    def _reserve(self, order: ReceiveKv) -> KvReserved | KvRefused:
        outputs = order.num_tokens - len(order.request.prompt)
        sequence = self._sequence(order, outputs, order.num_logged)
        sequence.phase = Phase.ARRIVING
        if not self._grow(sequence, order.num_tokens):
            return KvRefused(order.request.id, order.epoch)
        self.sequences[order.epoch] = sequence
        return KvReserved(order.request.id, order.epoch)

    def _send(self, order: SendKv) -> list[Sending]:
        sequence = self.sequences.get(order.epoch)
        if sequence is None:
            return []
        sequence.phase = Phase.FROZEN
        blocks = sequence.needed(sequence.computed) - order.start // sequence.kv.block_size
        sequence.sends += blocks > 0
        return [Sending(order.request_id, order.epoch, order.dst, order.dst_epoch,
                        sequence.outputs, sequence.computed, blocks * sequence.kv.block_bytes,
                        order.start)]  # fmt: skip

    def expects(self, sent: Sending) -> bool:
        """The header has come: has it room for what is being sent? If not, it lets go."""
        sequence = self.sequences[sent.dst_epoch]
        sequence.outputs = sent.outputs
        sequence.receiving = self._grow(sequence, sequence.known)
        if not sequence.receiving:
            self._end(sequence)
        return sequence.receiving

    def failed(self, sent: Sending) -> KvFailed:
        return KvFailed(sent.request_id, sent.dst_epoch, "no room for what it has grown by")

    def arrived(self, sent: Sending, took_s: float) -> list[Any]:
        """All of it is here; `KvReceived`, if it is still wanted."""
        if (ended := self.lingering.get(sent.dst_epoch)) is not None:
            ended.receiving = False
            self._let_go(ended)
            return self._parked()
        if (sequence := self.sequences.get(sent.dst_epoch)) is None:
            return []
        sequence.receiving, sequence.phase = False, Phase.RUNNING
        sequence.computed = sent.computed
        first, sequence.told = sequence.told, sequence.outputs
        num_bytes = sequence.needed(sent.computed) * sequence.kv.block_bytes
        return [KvReceived(sent.request_id, sent.dst_epoch, first, zeros(sent.outputs - first), (),
                           num_bytes, took_s)]  # fmt: skip

    def sent(self, epoch: int) -> list[Any]:
        """The blocks that were being read are its own again."""
        sequence = self.lingering.get(epoch) or self.sequences[epoch]
        sequence.sends -= 1
        if epoch in self.lingering:
            self._let_go(sequence)
        return self._parked()

    # --- blocks ---------------------------------------------------------------------------------

    def _grow(self, sequence: FastSequence, num_tokens: int) -> bool:
        """Blocks for `num_tokens` positions, all or none."""
        missing = max(0, sequence.needed(num_tokens) - sequence.blocks)
        if missing * sequence.kv.block_bytes > self.free:
            return False
        sequence.blocks += missing
        self.used += missing * sequence.kv.block_bytes
        return True

    def _end(self, sequence: FastSequence) -> None:
        self.lingering[sequence.epoch] = self.sequences.pop(sequence.epoch)
        self._let_go(sequence)

    def _let_go(self, sequence: FastSequence) -> None:
        if not sequence.in_flight:
            self.used -= sequence.blocks * sequence.kv.block_bytes
            del self.lingering[sequence.epoch]

    def _preempt(self, sequence: FastSequence) -> None:
        self._end(sequence)
        self.preempted.append(sequence)

    def _make_room(self, sequence: FastSequence) -> bool:
        while not self._grow(sequence, sequence.known):
            youngest = next(s for s in reversed(self.sequences.values())
                            if s.phase is Phase.RUNNING and not s.in_flight)  # fmt: skip
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    # --- steps ----------------------------------------------------------------------------------

    def plan(self) -> Stretch | None:
        """The next steps that are alike; None with nothing to compute."""
        assert self.stretch is None
        for model in self._turns:
            running, chunks = self._chunks(model)
            if chunks:
                self._turns.remove(model)
                self._turns.append(model)
                self.stretch = self._alike(running, chunks)
                return self.stretch
        return None

    def _chunks(self, model: str) -> tuple[int, list[tuple[FastSequence, int]]]:
        """(sequences of this model that want a step, those that get one)."""
        ready = [s for s in self.sequences.values() if s.phase is Phase.RUNNING and not s.in_flight]
        running = [s for s in ready if s.kv.model == model]
        running.sort(key=lambda s: s.known - s.computed > 1)
        budget, chunks = self.limits.max_num_batched_tokens, list[tuple[FastSequence, int]]()
        for sequence in running:
            if not budget or len(chunks) == self.limits.max_num_seqs:
                break
            if sequence.epoch not in self.sequences or not self._make_room(sequence):
                continue
            num = min(sequence.known - sequence.computed, budget)
            budget -= num
            chunks.append((sequence, num))
        return len(running), chunks

    def _alike(self, num_running: int, chunks: list[tuple[FastSequence, int]]) -> Stretch:
        sampled = sum(s.computed + num == s.known for s, num in chunks)
        prefill = sum(num for _, num in chunks) - sampled
        everyone = len(chunks) in (num_running, self.limits.max_num_seqs)
        others = any(s.kv is not chunks[0][0].kv and s.phase is Phase.RUNNING
                     for s in self.sequences.values())  # fmt: skip
        # Who was preempted for this step is told of after it.
        alike = everyone and not (others or prefill or self.preempted)
        steps = self._steps_alike([s for s, _ in chunks]) if alike else 1
        return Stretch(tuple(chunks), steps, self.cost.forward_s(prefill, sampled), prefill,
                       sampled)  # fmt: skip

    def _steps_alike(self, decoding: list[FastSequence]) -> int:
        """Until the first of them ends, or there is no block for one of them."""
        most = min(s.length - s.outputs for s in decoding)
        low = 1  # the step that has just been planned
        while low < most:  # the largest number that fits
            middle = (low + most + 1) // 2
            more = sum((max(0, s.needed(s.known + middle - 1) - s.blocks)) * s.kv.block_bytes
                       for s in decoding)  # fmt: skip
            low, most = (middle, most) if more <= self.free else (low, middle - 1)
        return max(1, low)

    def advance(self, steps: int) -> None:
        """So many steps of the stretch are over; with its last one, it is."""
        stretch = self.stretch
        assert stretch is not None and steps <= stretch.steps
        self.steps += steps
        self.step_s += steps * stretch.step_s
        self.prefill += steps * stretch.prefill
        self.decode += steps * stretch.decode
        for sequence, num in stretch.chunks:
            self._step(sequence, num, steps)
        left = stretch.steps - steps
        self.stretch = replace(stretch, steps=left) if left else None

    def _step(self, sequence: FastSequence, num: int, steps: int) -> None:
        sampled = sequence.computed + num == sequence.known
        sequence.computed += num + steps - 1  # more than one step: of one position each
        if not sampled:
            return
        has_room = self._grow(sequence, sequence.computed)
        assert has_room, f"{sequence} was planned without room"
        sequence.outputs += steps
        if sequence.outputs >= sequence.length:
            self.ended.append(sequence)
            self._end(sequence)

    def cut(self) -> None:
        """Somebody has written: nothing of this stretch after the step under way."""
        assert self.stretch is not None
        self.stretch = replace(self.stretch, steps=1)

    def wake(self) -> WorkerReady:
        """Arena anew; the announcement of it."""
        self._parking, self._said = False, (0, 0)
        return WorkerReady(self.models, self.capacity, self.limits.max_num_seqs, self.acked,
                           self.cost.wake_s)  # fmt: skip

    # --- reports --------------------------------------------------------------------------------

    def news(self) -> list[FastSequence]:
        """Those with tokens that the scheduler has not heard of. Whoever tells it sets `told`."""
        return [s for s in self.sequences.values()
                if s.outputs > s.told and s.phase is not Phase.ARRIVING]  # fmt: skip

    def told(self) -> None:
        """The scheduler has heard how many steps there were, and what is free."""
        self.steps, self.step_s, self.prefill, self.decode = 0, 0.0, 0, 0
        self._said = (self.acked, self.free)

    def report(self) -> StepReport | None:
        """What the scheduler has not heard of; None if there is nothing."""
        runs = self.news() + [s for s in self.preempted if s.outputs > s.told]
        if not (runs or self.ended or self.preempted) and self._said == (self.acked, self.free):
            return None
        news = zeros(sum(s.outputs - s.told for s in runs))
        for s in self.ended:
            news += (*zeros(s.outputs - s.told - 1), STOP)
        runs += self.ended
        report = StepReport(
            steps=self.steps, step_s=self.step_s, prefill_tokens=self.prefill,
            decode_tokens=self.decode, free_bytes=self.free, acked=self.acked,
            request_ids=tuple([s.request_id for s in runs]), epochs=tuple([s.epoch for s in runs]),
            firsts=tuple([s.told for s in runs]), counts=tuple([s.outputs - s.told for s in runs]),
            tokens=news, logprobs=(),
            preempted=tuple([(s.request_id, s.epoch) for s in self.preempted]),
        )  # fmt: skip
        for s in runs:
            s.told = s.outputs
        self.ended, self.preempted = [], []
        self.told()
        return report
