"""KV of outgoing sequences: sent in rounds while they decode on. Pure.

A round is a header and the blocks that are full at that time; full blocks are never written again.
When few blocks are left, or rounds stop shrinking, the source makes one more step. It announces
the blocks that will remain after that step, a half-full one included, before the step: the
destination posts their receive meanwhile, and the last header brings only the tokens and the
number of computed positions.

In a split, where the destination computes a part itself, the source decodes on until
`PartComputed` comes: the remaining blocks stay announced, are sent once they have become full, and
the next round is announced.
"""

from mellmpi.protocol import (
    DATA_PLANE,
    ROUNDS,
    BlocksSent,
    KvPayload,
    SendBlocks,
    SendKv,
)
from mellmpi.worker.messages import Outbox
from mellmpi.worker.sequence_table import SequenceTable
from mellmpi.worker.sequences import OutgoingKv, Phase, Sequence

FEW_BLOCKS = 1  # full ones: sending them after the freeze takes no longer than another round


class KvSender:
    """The source's part of a migration."""

    def __init__(self, table: SequenceTable):
        self._table = table
        # Remaining blocks whose header is sent: they must follow, whatever happens.
        self._announced: list[tuple[Sequence, SendBlocks]] = []

    @property
    def has_announced(self) -> bool:
        """Whether the remaining blocks of some sequence are announced."""
        return bool(self._announced)

    @property
    def freezes_after_step(self) -> bool:
        """Whether some sequence is frozen after the next step."""
        outgoing = (sequence.outgoing for sequence, _ in self._announced)
        return any(o is not None and not o.awaits_part for o in outgoing)

    def begin(self, order: SendKv) -> Outbox:
        """Start the migration. Returns the first round."""
        sequence = self._table.sequences.get(order.epoch)
        if sequence is None:  # preempted or finished; a report tells the scheduler
            return []
        first = order.start // self._table.tables.block_size(sequence)
        outgoing = OutgoingKv(order.dst, order.dst_epoch, first, awaits_part=order.start > 0)
        sequence.outgoing = outgoing
        return self._next_round(sequence, outgoing)

    def abort(self, sequence: Sequence) -> None:
        """Abort the migration: the sequence decodes on, no further round begins."""
        sequence.outgoing, sequence.phase = None, Phase.RUNNING

    def blocks_sent(self, event: BlocksSent) -> Outbox:
        """Record the end of a round. Returns the next round, if one follows."""
        if (sequence := self._table.transfer_ended(event.epoch, event.round)) is None:
            return []
        outgoing = sequence.outgoing
        if outgoing is None or sequence.phase is Phase.FROZEN or event.round != outgoing.tag:
            return []
        outgoing.round += 1
        return self._next_round(sequence, outgoing)

    def part_computed(self, dst_epoch: int) -> Outbox:
        """Record that the destination has computed its part: the sequence may be frozen."""
        for sequence in self._table.sequences.values():
            outgoing = sequence.outgoing
            if outgoing is not None and outgoing.dst_epoch == dst_epoch:
                outgoing.awaits_part = False
                return self._freeze_or_next_round(sequence, outgoing)
        return []  # the sequence has ended, or its migration was aborted

    def _freeze_or_next_round(self, sequence: Sequence, outgoing: OutgoingKv) -> Outbox:
        for entry in self._announced:
            if entry[0] is sequence:
                self._announced.remove(entry)
                return self._freeze(outgoing, *entry)
        if sequence.phase is Phase.FROZEN or outgoing.tag in sequence.sending:
            return []
        return self._next_round(sequence, outgoing)

    def _next_round(self, sequence: Sequence, outgoing: OutgoingKv) -> Outbox:
        tables = self._table.tables
        full = sequence.num_computed // tables.block_size(sequence)
        unsent = full - outgoing.next_block
        if outgoing.round == ROUNDS - 1:  # the last tag is kept for the remaining blocks
            return [] if outgoing.awaits_part else self._announce_remaining(sequence, outgoing)
        shrinks = unsent < outgoing.prior_blocks or outgoing.awaits_part
        if unsent <= FEW_BLOCKS or not shrinks:
            return self._announce_remaining(sequence, outgoing)
        return self._round(sequence, outgoing, full, last=False)

    def _announce_remaining(self, sequence: Sequence, outgoing: OutgoingKv) -> Outbox:
        """Announce the blocks that will remain after one more step.

        Freezes the sequence now if no step is possible.
        """
        tables, num_tokens = self._table.tables, sequence.num_tokens
        if num_tokens - sequence.num_computed > 1 or not tables.grow(sequence, num_tokens):
            return self._last_round(sequence, outgoing)
        end = tables.blocks_needed(sequence, num_tokens)
        [header, (_, blocks)] = self._round(sequence, outgoing, end, last=False)
        assert isinstance(blocks, SendBlocks)
        self._announced.append((sequence, blocks))
        return [header]

    def after_step(self) -> Outbox:
        """Freeze the announced sequences, unless the destination still computes its part."""
        announced, self._announced = self._announced, []
        outbox: Outbox = []
        for sequence, blocks in announced:
            outgoing = sequence.outgoing
            if outgoing is None or sequence.epoch not in self._table.sequences:
                outbox += self._send_announced(sequence, blocks)
            elif not outgoing.awaits_part:
                outbox += self._freeze(outgoing, sequence, blocks)
            elif self._announced_are_full(sequence, outgoing):
                outbox.append((DATA_PLANE, blocks))
            else:
                self._announced.append((sequence, blocks))
        return outbox

    def _freeze(self, outgoing: OutgoingKv, sequence: Sequence, blocks: SendBlocks) -> Outbox:
        """Freeze the sequence. Returns the last header and the announced blocks."""
        sequence.phase = Phase.FROZEN
        header = self._round(sequence, outgoing, outgoing.next_block, last=True)
        return [*header, *self._send_announced(sequence, blocks)]

    def _announced_are_full(self, sequence: Sequence, outgoing: OutgoingKv) -> bool:
        announced = outgoing.next_block * self._table.tables.block_size(sequence)
        return sequence.num_computed >= announced

    def send_aborted(self) -> Outbox:
        """Send the announced blocks of aborted migrations: their receives are posted."""
        live = self._table.sequences
        aborted = [a for a in self._announced if a[0].outgoing is None or a[0].epoch not in live]
        self._announced = [a for a in self._announced if a not in aborted]
        return [message for entry in aborted for message in self._send_announced(*entry)]

    def _send_announced(self, sequence: Sequence, blocks: SendBlocks) -> Outbox:
        sequence.sending_partial.add(blocks.tag)
        return [(DATA_PLANE, blocks)]

    def _last_round(self, sequence: Sequence, outgoing: OutgoingKv) -> Outbox:
        sequence.phase = Phase.FROZEN
        end = self._table.tables.blocks_needed(sequence, sequence.num_computed)
        outbox = self._round(sequence, outgoing, end, last=True)
        sequence.sending_partial |= sequence.sending & {outgoing.tag}
        return outbox

    def _round(self, sequence: Sequence, outgoing: OutgoingKv, end: int, last: bool) -> Outbox:
        """Return the header and the transfer of all unsent blocks before block `end`."""
        first, ids = outgoing.next_block, sequence.block_table[outgoing.next_block : end]
        outgoing.next_block, outgoing.prior_blocks = end, len(ids)
        header = KvPayload(
            request_id=sequence.request.id,
            epoch=outgoing.dst_epoch,
            fingerprint=self._table.fingerprint(sequence),
            first_block=first,
            num_blocks=len(ids),
            num_computed=sequence.num_computed,
            outputs=tuple(sequence.outputs) if last else (),
            logprobs=tuple(sequence.logprobs.items()) if last else (),
            last=last,
            tag=outgoing.tag,
        )
        outbox: Outbox = [(outgoing.dst, header)]
        if ids:
            sequence.sending.add(outgoing.tag)
            blocks = SendBlocks(
                sequence.request.id, sequence.epoch, outgoing.dst, outgoing.tag, tuple(ids)
            )
            outbox.append((DATA_PLANE, blocks))
        return outbox
