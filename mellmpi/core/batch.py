"""What one worker computes next, and where the KV of its sequences lies. Pure.

The driver hands in messages (`handle`), asks for a step (`plan`), runs it, and hands the result
back (`commit`); `report` is what the scheduler has to hear since the last one.
"""

from typing import Any

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.core.block_tables import BlockTables
from mellmpi.core.requests import finish_reason
from mellmpi.core.sequences import Phase, Sequence
from mellmpi.core.unreported import Unreported
from mellmpi.protocol import (
    DATA_PLANE,
    SCHEDULER,
    Address,
    Assign,
    BlocksArrived,
    BlocksSent,
    Chunk,
    DrainBlocks,
    HostedModel,
    KvFailed,
    KvPayload,
    KvReceived,
    KvRefused,
    KvReserved,
    Park,
    Parked,
    ReceiveBlocks,
    ReceiveKv,
    Release,
    SendBlocks,
    SendKv,
    StepPlan,
    StepReport,
    StepResult,
    TokenLogprob,
    Unfreeze,
)

Commands = list[tuple[Address, Any]]


class BatchScheduler:
    """The sequences of one worker and their blocks. Everything is keyed by epoch.

    Between `plan` and its `commit` nothing is handled: the pass still writes the blocks.
    """

    def __init__(self, models: tuple[HostedModel, ...], num_blocks: int, acked: int,
                 batch: BatchConfig, cache: CacheConfig):  # fmt: skip
        [self.block_bytes] = {m.kv.block_bytes for m in models}  # one size: any model can use it
        self._fingerprints = {m.kv.model: m.fingerprint for m in models}
        self._turns = list(self._fingerprints)  # models; who computed last comes last
        self.tables = BlockTables((m.kv for m in models), num_blocks, cache.enable_prefix_caching)
        self.pool = self.tables.pool
        self.sequences: dict[int, Sequence] = {}  # oldest assignment first
        self.lingering: dict[int, Sequence] = {}  # ended, but a transfer touches their blocks
        self.acked = acked
        self._limits = batch
        self._planned: list[Sequence] = []
        self._unreported = Unreported()
        self._parking = False

    @property
    def free_bytes(self) -> int:
        return self.pool.num_free * self.block_bytes

    # --- events ---------------------------------------------------------------------------------

    def handle(self, source: Address, event: Any) -> Commands:
        """Apply one message; return what must be sent because of it."""
        assert not self._planned, f"{event} between plan and commit"
        if source == SCHEDULER:
            self.acked += 1
        commands = self._handle(source, event)
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
                    self._end(sequence)
            case ReceiveKv():
                return self._reserve(event)
            case SendKv():
                return self._send(event)
            case Unfreeze(_, epoch):
                if sequence := self.sequences.get(epoch):
                    sequence.phase = Phase.RUNNING
            case KvPayload():
                return self._payload(source, event)
            case BlocksArrived():
                return self._arrived(event)
            case BlocksSent(_, epoch):
                self._sent(epoch)
            case Park():
                self._parking = True
            case _:
                raise TypeError(event)
        return []

    def _assign(self, order: Assign) -> None:
        assert order.request.model in self._fingerprints, f"{order.request.model} is not here"
        sequence = Sequence(order.request, order.epoch, list(order.outputs), [])
        sequence.num_reported = len(order.outputs)
        self.sequences[order.epoch] = sequence
        self.tables.reuse_prefix(sequence)
        if not self.tables.grow(sequence, sequence.num_tokens):
            self._preempt(sequence)

    def _reserve(self, order: ReceiveKv) -> Commands:
        assert order.request.model in self._fingerprints, f"{order.request.model} is not here"
        sequence = Sequence(order.request, order.epoch, [], [], Phase.ARRIVING, src=order.src)
        sequence.num_reported = order.num_logged
        if not self.tables.grow(sequence, order.num_tokens):
            return [(SCHEDULER, KvRefused(order.request.id, order.epoch))]
        self.sequences[order.epoch] = sequence
        return [(SCHEDULER, KvReserved(order.request.id, order.epoch))]

    def _send(self, order: SendKv) -> Commands:
        sequence = self.sequences.get(order.epoch)
        if sequence is None:  # preempted or finished meanwhile; the scheduler will hear of it
            return []
        sequence.phase = Phase.FROZEN
        held = sequence.block_table[: self.tables.needed(sequence, sequence.num_computed)]
        header = KvPayload(
            request_id=order.request_id, epoch=order.dst_epoch,
            fingerprint=self._fingerprints[sequence.request.model],
            first_block=0, num_blocks=len(held), num_computed=sequence.num_computed,
            outputs=tuple(sequence.outputs), logprobs=tuple(sequence.logprobs.items()),
            last=True, tag=order.dst_epoch,
        )  # fmt: skip
        commands: Commands = [(order.dst, header)]
        if held:
            sequence.sends += 1
            blocks = SendBlocks(
                order.request_id, order.epoch, order.dst, order.dst_epoch, tuple(held)
            )
            commands.append((DATA_PLANE, blocks))
        return commands

    def _payload(self, source: Address, header: KvPayload) -> Commands:
        assert isinstance(source, int)
        sequence = self.sequences.get(header.epoch)
        if sequence is None:  # released before it came: take it off the wire, nothing more
            return self._drain(source, header)
        if (why := self._mismatch(sequence, header)) is not None:
            self._end(sequence)
            failed = KvFailed(header.request_id, header.epoch, why)
            return [*self._drain(source, header), (SCHEDULER, failed)]
        sequence.outputs = list(header.outputs)
        sequence.logprobs = dict(header.logprobs)
        sequence.num_computed = header.num_computed
        if not header.num_blocks:  # frozen before its first step: nothing to wait for
            nothing = BlocksArrived(
                header.request_id, header.epoch, True, 0.0, header.tag, reason=""
            )
            return self._arrived(nothing)
        sequence.receiving = True
        ids = tuple(sequence.block_table[: header.num_blocks])
        receive = ReceiveBlocks(header.request_id, header.epoch, source, header.tag, ids)
        return [(DATA_PLANE, receive)]

    def _mismatch(self, sequence: Sequence, header: KvPayload) -> str | None:
        ours = self._fingerprints[sequence.request.model]
        if header.fingerprint != ours:
            return f"KV layout {header.fingerprint} is not ours ({ours})"
        # It may have grown since the reservation was made.
        known = len(sequence.request.prompt) + len(header.outputs)
        return None if self.tables.grow(sequence, known) else "no room for what it has grown by"

    def _drain(self, source: int, header: KvPayload) -> Commands:
        drain = DrainBlocks(source, header.tag, header.num_blocks)
        return [(DATA_PLANE, drain)] if header.num_blocks else []

    def _arrived(self, event: BlocksArrived) -> Commands:
        if (ended := self.lingering.get(event.epoch)) is not None:
            ended.receiving = False
            self._free(ended)
            return []
        sequence = self.sequences[event.epoch]
        sequence.receiving = False
        if not event.ok:
            self._end(sequence)
            return [(SCHEDULER, KvFailed(event.request_id, event.epoch, "the stream broke off"))]
        sequence.phase = Phase.RUNNING
        self.tables.know(sequence)
        first = sequence.num_reported
        sequence.num_reported = len(sequence.outputs)
        num_blocks = self.tables.needed(sequence, sequence.num_computed)
        received = KvReceived(
            event.request_id, event.epoch, first, tuple(sequence.outputs[first:]),
            sequence.logprobs_from(first), num_blocks * self.block_bytes, event.transfer_s,
        )  # fmt: skip
        return [(SCHEDULER, received)]

    def _sent(self, epoch: int) -> None:
        sequence = self.lingering.get(epoch) or self.sequences[epoch]
        sequence.sends -= 1
        if epoch in self.lingering:
            self._free(sequence)

    # --- blocks ---------------------------------------------------------------------------------

    def _end(self, sequence: Sequence) -> None:
        self.lingering[sequence.epoch] = self.sequences.pop(sequence.epoch)
        self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        """Give the blocks of what has ended back, once no transfer touches them any more."""
        if not sequence.in_flight:
            self.pool.give(sequence.block_table)
            del self.lingering[sequence.epoch]

    def _preempt(self, sequence: Sequence) -> None:
        self._end(sequence)
        self._unreported.preempted(sequence)

    def _make_room(self, sequence: Sequence) -> bool:
        """A block for its next position, if need be by preempting the youngest; False: itself."""
        while not self.tables.grow(sequence, sequence.num_tokens):
            youngest = next(
                s for s in reversed(self.sequences.values())
                if s.phase is Phase.RUNNING and not s.in_flight
            )  # fmt: skip
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

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
        # While a send reads its blocks, even one that will be thrown away, nobody may write them.
        running = [
            s for s in self.sequences.values()
            if s.request.model == model and s.phase is Phase.RUNNING and not s.in_flight
        ]  # fmt: skip
        running.sort(key=lambda s: s.num_tokens - s.num_computed > 1)  # stable: oldest first
        budget = self._limits.max_num_batched_tokens
        chunks: list[Chunk] = []  # only the last can end before its sequence has caught up
        for sequence in running:
            if not budget or len(chunks) == self._limits.max_num_seqs:
                break
            if sequence.epoch not in self.sequences or not self._make_room(sequence):
                continue  # preempted: for an older one, or because it is the youngest
            end = min(sequence.num_tokens, sequence.num_computed + budget)
            budget -= end - sequence.num_computed
            # Who has its chunk keeps it: only decodes grow, and they push out what comes later.
            self._planned.append(sequence)
            chunks.append(self._chunk(sequence, end))
        return chunks

    def _chunk(self, sequence: Sequence, end: int) -> Chunk:
        caught_up = end == sequence.num_tokens
        return Chunk(
            request_id=sequence.request.id, start=sequence.num_computed,
            tokens=sequence.token_range(sequence.num_computed, end),
            block_table=sequence.block_table,
            sampling=sequence.request.sampling if caught_up else None,
            history=(sequence.request.prompt, sequence.outputs),
        )  # fmt: skip

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Take in what the pass of `plan`, the last one made, produced."""
        sampled = zip(result.tokens, result.logprobs, strict=True)
        for sequence, chunk in zip(self._planned, plan.chunks, strict=True):
            sequence.num_computed += len(chunk.tokens)
            self.tables.know(sequence)
            self._unreported.computed(len(chunk.tokens), chunk.sampling is not None)
            if chunk.sampling is not None:
                self._append(sequence, *next(sampled))
        self._planned = []

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        if logprob is not None:
            sequence.logprobs[len(sequence.outputs)] = logprob
        sequence.outputs.append(token)
        self._unreported.token(sequence)
        if finish_reason(sequence.request, sequence.outputs):
            self._end(sequence)

    # --- reports --------------------------------------------------------------------------------

    def report(self, steps: int, step_s: float) -> StepReport | None:
        """What happened since the last report, in `steps` passes of `step_s`; None if nothing."""
        return self._unreported.report(steps, step_s, self.free_bytes, self.acked)
