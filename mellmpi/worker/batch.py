"""What one worker computes next, and where the KV of its sequences lies. Pure.

The driver hands in messages (`handle`), asks for a step (`plan`), runs it, and hands the result
back (`commit`); `report` is what the scheduler has to hear since the last one.
"""

from typing import Any

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.costs import UNKNOWN, StepBudget, StepSeconds, chunk_s
from mellmpi.protocol import (
    SCHEDULER,
    Address,
    Assign,
    BlocksArrived,
    BlocksSent,
    Chunk,
    HostedModel,
    KvPayload,
    Park,
    Parked,
    PartComputed,
    ReceiveKv,
    Release,
    Request,
    SendKv,
    StepPlan,
    StepReport,
    StepResult,
    TokenLogprob,
    Unfreeze,
    finish_reason,
)
from mellmpi.worker.kv_receiver import KvReceiver
from mellmpi.worker.kv_sender import KvSender
from mellmpi.worker.kvcache import BlockTables
from mellmpi.worker.report_buffer import ReportBuffer
from mellmpi.worker.sequence_table import SequenceTable
from mellmpi.worker.sequences import Phase, Sequence

Commands = list[tuple[Address, Any]]


class BatchScheduler:
    """The sequences of one worker and their blocks. Everything is keyed by epoch.

    Between `plan` and its `commit` nothing is handled: the pass still writes the blocks.
    """

    def __init__(
        self,
        models: tuple[HostedModel, ...],
        num_blocks: int,
        acked: int,
        batch: BatchConfig,
        cache: CacheConfig,
    ):
        self._turns = [m.kv.model for m in models]  # who computed last comes last
        self.tables = BlockTables((m.kv for m in models), num_blocks, cache.enable_prefix_caching)
        self.pool = self.tables.pool
        self.table = SequenceTable(self.tables, {m.kv.model: m.fingerprint for m in models})
        self.sequences, self.lingering = self.table.sequences, self.table.lingering
        self._sender, self._receiver = KvSender(self.table), KvReceiver(self.table)
        self.acked = acked
        self._limits = batch
        self._budget = StepBudget(batch.max_num_batched_tokens, batch.target_step_s)
        self.step_seconds: StepSeconds = UNKNOWN  # what steps take here, as the driver measures it
        self._planned: list[Sequence] = []
        self._reports = ReportBuffer()
        self._parking = False

    @property
    def block_bytes(self) -> int:
        return self.tables.block_bytes

    @property
    def free_bytes(self) -> int:
        return self.pool.num_free * self.block_bytes

    # --- events ---------------------------------------------------------------------------------

    def handle(self, source: Address, event: Any) -> Commands:
        """Apply one message; return what must be sent because of it."""
        assert not self._planned, f"{event} between plan and commit"
        if source == SCHEDULER:
            self.acked += 1
        commands = self._handle(source, event) + self._sender.settle()
        if self._parking and not self.sequences and not self.lingering:
            self._parking = False
            commands.append((SCHEDULER, Parked(self.acked)))
        return commands

    def _handle(self, source: Address, event: Any) -> Commands:
        match event:
            case Assign():
                self._assign(event)
            case Release(_, epoch):
                if sequence := self.sequences.get(epoch):
                    self.table.end(sequence)
            case ReceiveKv(request):
                self._must_host(request)
                return self._receiver.reserve(event)
            case SendKv():
                return self._sender.begin(event)
            case Unfreeze(_, epoch):
                if sequence := self.sequences.get(epoch):
                    self._sender.stop(sequence)
            case PartComputed(_, epoch):
                return self._sender.part_computed(epoch)
            case KvPayload():
                return self._receiver.announced(source, event)
            case BlocksArrived():
                return self._receiver.arrived(event)
            case BlocksSent():
                return self._sender.sent(event)
            case Park():
                self._parking = True
            case _:
                raise TypeError(event)
        return []

    def _must_host(self, request: Request) -> None:
        assert request.model in self._turns, f"{request.model} is not here"

    def _assign(self, order: Assign) -> None:
        self._must_host(order.request)
        sequence = Sequence(order.request, order.epoch, list(order.outputs), [])
        sequence.num_reported = len(order.outputs)
        self.sequences[order.epoch] = sequence
        self.tables.reuse_prefix(sequence)
        if not self.tables.grow(sequence, sequence.num_tokens):
            self._preempt(sequence)

    # --- blocks ---------------------------------------------------------------------------------

    def _preempt(self, sequence: Sequence) -> None:
        self.table.end(sequence)
        self._reports.preempted(sequence)

    def _make_room(self, sequence: Sequence) -> bool:
        """A block for its next position, if need be by preempting the youngest; False: none."""
        while not self.tables.grow(sequence, sequence.num_tokens):
            youngest = self._victim(sequence)
            if youngest is not None:
                self._preempt(youngest)
            if youngest is None or youngest is sequence:
                return False
        return True

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """The youngest whose blocks are free at once, at the most itself.

        None if it is being sent itself: then it waits, and leaves with what it has.
        """
        for other in reversed(self.sequences.values()):
            if other.phase is Phase.RUNNING and not other.in_flight:
                return other
            if other is sequence:
                break
        return None

    # --- steps ----------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """The next forward pass, or None with nothing to compute.

        A pass is of one model; models that have something to compute take turns.
        """
        assert not self._planned, "planned twice without a commit"
        for model in self._turns:
            if chunks := self._chunks(model):
                self._turns.remove(model)
                self._turns.append(model)
                return StepPlan(model, tuple(chunks), ())
        return None

    def _chunks(self, model: str) -> list[Chunk]:
        """Of this model's sequences, within the limits of a step. Decodes first, then prefill."""
        running = [s for s in self.sequences.values() if s.request.model == model and s.computable]
        # Stable: oldest first. What is only to be decoded elsewhere or later comes last.
        running.sort(key=lambda s: (s.arrival is not None, s.end - s.num_computed > 1))
        budget, left_s = self._budget.max_tokens, self._prompt_s(running)
        chunks: list[Chunk] = []  # of those that run here, only the last may not catch up
        for sequence in running:
            if budget <= 0 or len(chunks) == self._limits.max_num_seqs:
                break
            if sequence.epoch not in self.sequences or not self._make_room(sequence):
                continue  # preempted: for an older one, or because it is the youngest
            start, count = sequence.num_computed, sequence.end - sequence.num_computed
            if count > 1 and left_s <= 0:
                break
            if count > 1:
                fits = min(budget, self._budget.num_tokens(self.step_seconds, start, left_s))
                if fits < count:
                    count = budget = fits  # nothing is left for others
                left_s -= chunk_s(self.step_seconds, start, count)
            budget -= count
            # Who has its chunk keeps it: only decodes grow, and they push out what comes later.
            self._planned.append(sequence)
            chunks.append(self._chunk(sequence, start + count))
        return chunks

    def _prompt_s(self, running: list[Sequence]) -> float:
        """Time for prompts in the next step."""
        num_decoding = sum(s.end - s.num_computed == 1 for s in running)
        num_prompts = len(running) - num_decoding
        closing = self._sender.leaving or self._receiver.closing
        num_decoding = min(num_decoding, self._limits.max_num_seqs)
        return self._budget.prompt_s(self.step_seconds, num_decoding, num_prompts, closing)

    def _chunk(self, sequence: Sequence, end: int) -> Chunk:
        caught_up = end == sequence.num_tokens
        return Chunk(
            request_id=sequence.request.id,
            start=sequence.num_computed,
            tokens=sequence.token_range(sequence.num_computed, end),
            block_table=sequence.block_table,
            sampling=sequence.request.sampling if caught_up else None,
            history=(sequence.request.prompt, sequence.outputs),
        )

    def commit(self, plan: StepPlan, result: StepResult) -> Commands:
        """Take in what the pass of `plan`, the last one made, produced; what must be sent."""
        commands: Commands = []
        sampled = zip(result.tokens, result.logprobs, strict=True)
        for sequence, chunk in zip(self._planned, plan.chunks, strict=True):
            sequence.num_computed += len(chunk.tokens)
            self.tables.know(sequence)
            self._reports.computed(chunk.start, len(chunk.tokens), chunk.sampling is not None)
            if chunk.sampling is not None:
                self._append(sequence, *next(sampled))
            commands += self._receiver.complete(sequence)
        self._planned = []
        return self._sender.stepped() + commands

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        if logprob is not None:
            sequence.logprobs[len(sequence.outputs)] = logprob
        sequence.outputs.append(token)
        self._reports.token(sequence)
        if finish_reason(sequence.request, sequence.outputs):
            self.table.end(sequence)

    # --- reports --------------------------------------------------------------------------------

    def report(self, steps: int, step_s: float) -> StepReport | None:
        """What happened since the last report, in `steps` passes of `step_s`; None if nothing."""
        return self._reports.report(steps, step_s, self.free_bytes, self.acked)
