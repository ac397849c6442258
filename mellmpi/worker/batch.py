"""The batch scheduler of one worker: which tokens each step computes, and where KV is kept. Pure.

The driver passes messages in (`handle`), asks for a step (`plan`), executes it, and passes the
result back (`commit`); `report` returns the news for the cluster scheduler.
"""

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
from mellmpi.worker.messages import BatchEvent, Outbox
from mellmpi.worker.report_buffer import ReportBuffer
from mellmpi.worker.sequence_table import SequenceTable
from mellmpi.worker.sequences import Phase, Sequence

# While there are prompts, one step in so many only decodes: the step target is a multiple of such
# steps, and they take longer as contexts grow.
DECODE_ONLY_EVERY = 12


class BatchScheduler:
    """The sequences of one worker, keyed by epoch, and their blocks.

    Between `plan` and its `commit` no message is handled: the step still writes the blocks.
    """

    def __init__(
        self,
        models: tuple[HostedModel, ...],
        num_blocks: int,
        acked: int,
        batch: BatchConfig,
        cache: CacheConfig,
    ):
        self._models = [m.kv.model for m in models]  # least recently computed first
        self.tables = BlockTables((m.kv for m in models), num_blocks, cache.enable_prefix_caching)
        self.pool = self.tables.pool
        self.table = SequenceTable(self.tables, {m.kv.model: m.fingerprint for m in models})
        self.sequences, self.lingering = self.table.sequences, self.table.lingering
        self._sender, self._receiver = KvSender(self.table), KvReceiver(self.table)
        self.acked = acked  # messages of the cluster scheduler handled so far
        self._limits = batch
        self._budget = StepBudget(batch.max_num_batched_tokens, batch.target_step_s)
        self.step_seconds: StepSeconds = UNKNOWN  # as the driver measures it
        self._num_mixed = 0  # steps with decodes and prompts since the last that only decoded
        self._planned: list[Sequence] = []
        self._reports = ReportBuffer()
        self._parking = False

    @property
    def block_bytes(self) -> int:
        return self.tables.block_bytes

    @property
    def free_bytes(self) -> int:
        return self.pool.num_free * self.block_bytes

    # --- messages -------------------------------------------------------------------------------

    def handle(self, source: Address, event: BatchEvent) -> Outbox:
        """Apply one message. Returns the messages to send."""
        assert not self._planned, f"{event} between plan and commit"
        if source == SCHEDULER:
            self.acked += 1
        outbox = self._handle(source, event) + self._sender.send_aborted()
        if self._parking and not self.sequences and not self.lingering:
            self._parking = False
            outbox.append((SCHEDULER, Parked(self.acked)))
        return outbox

    def _handle(self, source: Address, event: BatchEvent) -> Outbox:
        match event:
            case Assign():
                self._assign(event)
            case Release(_, epoch):
                if sequence := self.sequences.get(epoch):
                    self.table.end(sequence)
            case ReceiveKv(request):
                self._check_hosted(request)
                return self._receiver.reserve(event)
            case SendKv():
                return self._sender.begin(event)
            case Unfreeze(_, epoch):
                if sequence := self.sequences.get(epoch):
                    self._sender.abort(sequence)
            case PartComputed(_, epoch):
                return self._sender.part_computed(epoch)
            case KvPayload():
                return self._receiver.header(source, event)
            case BlocksArrived():
                return self._receiver.blocks_arrived(event)
            case BlocksSent():
                return self._sender.blocks_sent(event)
            case Park():
                self._parking = True
            case _:
                raise TypeError(event)
        return []

    def _check_hosted(self, request: Request) -> None:
        assert request.model in self._models, f"{request.model} is not here"

    def _assign(self, order: Assign) -> None:
        self._check_hosted(order.request)
        sequence = Sequence(order.request, order.epoch, list(order.outputs), [])
        sequence.num_reported = len(order.outputs)
        self.sequences[order.epoch] = sequence
        if order.request.sampling.num_prompt_logprobs is not None and not order.outputs:
            sequence.prompt_logprobs = []  # of all positions: none comes from the prefix cache
        else:
            self.tables.reuse_prefix(sequence)
        if self.tables.prefix_caching and not order.outputs:
            self._reports.placed(sequence)
        if not self.tables.grow(sequence, sequence.num_tokens):
            self._preempt(sequence)

    # --- blocks ---------------------------------------------------------------------------------

    def _preempt(self, sequence: Sequence) -> None:
        self.table.end(sequence)
        self._reports.preempted(sequence)

    def _make_room(self, sequence: Sequence) -> bool:
        """Allocate a block for the next position, preempting the youngest if necessary.

        False if no block can be freed, or if the sequence itself was preempted.
        """
        while not self.tables.grow(sequence, sequence.num_tokens):
            victim = self._victim(sequence)
            if victim is not None:
                self._preempt(victim)
            if victim is None or victim is sequence:
                return False
        return True

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """Return the youngest sequence whose blocks can be freed now, at the oldest `sequence`.

        None if the blocks of `sequence` are in transfer, too: it waits, and migrates as it is.
        """
        for other in reversed(self.sequences.values()):
            if other.phase is Phase.RUNNING and not other.in_flight:
                return other
            if other is sequence:
                break
        return None

    # --- steps ----------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """Return the next forward pass, or None if there is nothing to compute.

        A pass computes one model; models with work alternate.
        """
        assert not self._planned, "planned twice without a commit"
        for model in self._models:
            if chunks := self._chunks(model):
                self._models.remove(model)
                self._models.append(model)
                return StepPlan(model, tuple(chunks), ())
        return None

    def _chunks(self, model: str) -> list[Chunk]:
        """Return chunks of this model's sequences within the step's limits, decodes first."""
        running = [s for s in self.sequences.values() if s.request.model == model and s.computable]
        # Stable sort: oldest first within each class. Sequences being received come last.
        running.sort(key=lambda s: (s.incoming is not None, s.compute_end - s.num_computed > 1))
        budget, left_s = self._budget.max_tokens, self._prompt_s(running)
        chunks: list[Chunk] = []  # of running sequences, only the last may stay behind its tokens
        for sequence in running:
            if budget <= 0 or len(chunks) == self._limits.max_num_seqs:
                break
            if sequence.epoch not in self.sequences or not self._make_room(sequence):
                continue  # preempted for an older sequence, or as the youngest
            start, count = sequence.num_computed, sequence.compute_end - sequence.num_computed
            if count > 1 and left_s <= 0:
                break
            if count > 1:
                fits = min(budget, self._budget.num_tokens(self.step_seconds, start, left_s))
                if fits < count:
                    count = budget = fits  # uses up the budget
                left_s -= chunk_s(self.step_seconds, start, count)
            budget -= count
            # A planned sequence keeps its chunk: only decodes grow, and they preempt later ones.
            self._planned.append(sequence)
            chunks.append(self._chunk(sequence, start + count))
        return chunks

    def _prompt_s(self, running: list[Sequence]) -> float:
        """Return the time for prompts in the next step, in seconds."""
        num_decoding = sum(s.compute_end - s.num_computed == 1 for s in running)
        num_prompts = len(running) - num_decoding
        handover = self._sender.freezes_after_step or self._receiver.awaits_final_blocks
        num_decoding = min(num_decoding, self._limits.max_num_seqs)
        if num_decoding and num_prompts and self._budget.follows_decodes(self.step_seconds):
            self._num_mixed = (self._num_mixed + 1) % DECODE_ONLY_EVERY
            if not self._num_mixed:
                return 0.0
        return self._budget.prompt_s(self.step_seconds, num_decoding, num_prompts, handover)

    def _chunk(self, sequence: Sequence, end: int) -> Chunk:
        request, start, scoring = sequence.request, sequence.num_computed, None
        if sequence.prompt_logprobs is not None:
            scoring = sequence.scoring(start, end)
        return Chunk(
            request_id=request.id,
            start=start,
            tokens=sequence.token_range(start, end),
            block_table=sequence.block_table,
            sampling=request.sampling if end == sequence.num_tokens else None,
            history=(request.prompt, sequence.outputs),
            scoring=scoring,
        )

    def commit(self, plan: StepPlan, result: StepResult) -> Outbox:
        """Apply the result of `plan`, the last plan made. Returns the messages to send."""
        outbox: Outbox = []
        sampled = zip(result.tokens, result.logprobs, strict=True)
        scored = iter(result.prompt_logprobs)
        for sequence, chunk in zip(self._planned, plan.chunks, strict=True):
            sequence.num_computed += len(chunk.tokens)
            self.tables.register(sequence)
            self._reports.computed(chunk.start, len(chunk.tokens), chunk.sampling is not None)
            if chunk.scoring is not None and sequence.prompt_logprobs is not None:
                sequence.prompt_logprobs += next(scored)
            if chunk.sampling is not None:
                self._append(sequence, *next(sampled))
            outbox += self._receiver.activate_if_complete(sequence)
        self._planned = []
        return self._sender.after_step() + outbox

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        if logprob is not None:
            sequence.logprobs[len(sequence.outputs)] = logprob
        sequence.outputs.append(token)
        self._reports.token(sequence)
        if finish_reason(sequence.request, sequence.outputs):
            self.table.end(sequence)

    # --- reports --------------------------------------------------------------------------------

    def report(self, steps: int, step_s: float) -> StepReport | None:
        """Return the news since the last report, which covers `steps` steps of `step_s` in all.

        None if nothing has happened.
        """
        return self._reports.report(steps, step_s, self.free_bytes, self.acked)
