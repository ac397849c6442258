"""KV of incoming sequences: received in rounds, recomputed, or found in the prefix cache. Pure.

A header announces each round; rounds of ended sequences are still received, and discarded. The
sequence decodes on once the last round is in place and this worker's own part is computed.
"""

from mellmpi.protocol import (
    DATA_PLANE,
    SCHEDULER,
    Address,
    BlocksArrived,
    DrainBlocks,
    KvFailed,
    KvPayload,
    KvReceived,
    KvRefused,
    KvReserved,
    PartComputed,
    ReceiveBlocks,
    ReceiveKv,
)
from mellmpi.worker.messages import Outbox
from mellmpi.worker.sequence_table import SequenceTable
from mellmpi.worker.sequences import IncomingKv, Phase, Sequence

FINAL_BLOCKS = 2  # a round of at most a full and a half-full block: the source freezes soon


class KvReceiver:
    """The destination's part of a migration."""

    def __init__(self, table: SequenceTable):
        self._table = table

    def reserve(self, order: ReceiveKv) -> Outbox:
        """Reserve blocks. Returns the first position that must be sent, or a refusal."""
        table, tables = self._table, self._table.tables
        outputs = list(order.outputs)
        sequence = Sequence(order.request, order.epoch, outputs, [], Phase.RECEIVING)
        sequence.num_reported = order.num_logged
        tables.reuse_prefix(sequence)
        if not tables.grow(sequence, order.num_tokens):
            tables.pool.free(sequence.block_table)
            return [(SCHEDULER, KvRefused(order.request.id, order.epoch))]
        start = max(order.start, sequence.num_computed)
        size = tables.block_size(sequence)
        # The last block is always sent: the part computed here is never sampled from.
        assert start % size == 0 and start < order.num_tokens, f"a split at {start}: {order}"
        sequence.incoming = IncomingKv(order.src, start, start // size)
        table.sequences[order.epoch] = sequence
        return [(SCHEDULER, KvReserved(order.request.id, order.epoch, start))]

    def header(self, source: Address, header: KvPayload) -> Outbox:
        """Post the receive of the round that this header announces."""
        assert isinstance(source, int)
        sequence = self._table.sequences.get(header.epoch)
        if sequence is None or sequence.incoming is None:  # released meanwhile
            return self._drain(source, header)
        if (why := self._mismatch(sequence, sequence.incoming, header)) is not None:
            self._table.end(sequence)
            failed = KvFailed(header.request_id, header.epoch, why)
            return [*self._drain(source, header), (SCHEDULER, failed)]
        incoming = sequence.incoming
        incoming.announced = True
        incoming.src_stops_soon = header.last or header.num_blocks <= FINAL_BLOCKS
        first, incoming.next_block = incoming.next_block, incoming.next_block + header.num_blocks
        if header.last:
            sequence.outputs, sequence.logprobs = list(header.outputs), dict(header.logprobs)
            incoming.num_computed = header.num_computed
        if not header.num_blocks:
            return self.activate_if_complete(sequence)
        sequence.receiving.add(header.tag)
        ids = tuple(sequence.block_table[first : incoming.next_block])
        receive = ReceiveBlocks(header.request_id, header.epoch, source, header.tag, ids)
        return [(DATA_PLANE, receive), *self.activate_if_complete(sequence)]

    def _mismatch(self, sequence: Sequence, incoming: IncomingKv, header: KvPayload) -> str | None:
        """Return why the round cannot be received, or None."""
        ours = self._table.fingerprint(sequence)
        if header.fingerprint != ours:
            return f"KV layout {header.fingerprint} is not ours ({ours})"
        if header.first_block != incoming.next_block:
            return f"blocks from {header.first_block} on, not from {incoming.next_block}"
        # The sequence may have grown since the reservation.
        tables = self._table.tables
        known = (incoming.next_block + header.num_blocks) * tables.block_size(sequence)
        if header.last:
            known = len(sequence.request.prompt) + len(header.outputs)
        return None if tables.grow(sequence, known) else "no room for what it has grown by"

    def _drain(self, source: int, header: KvPayload) -> Outbox:
        drain = DrainBlocks(source, header.tag, header.num_blocks)
        return [(DATA_PLANE, drain)] if header.num_blocks else []

    @property
    def awaits_final_blocks(self) -> bool:
        """Whether some sequence needs only blocks in transfer, and its source freezes it soon."""
        receiving = ((s, s.incoming) for s in self._table.sequences.values())
        return any(
            i is not None and i.src_stops_soon and s.num_computed >= i.start for s, i in receiving
        )

    def blocks_arrived(self, event: BlocksArrived) -> Outbox:
        """Record that a round is in place, or has failed."""
        if (sequence := self._table.transfer_ended(event.epoch, event.round)) is None:
            return []
        assert sequence.incoming is not None, f"{event} for a complete sequence"
        if not event.ok:
            self._table.end(sequence)
            return [(SCHEDULER, KvFailed(event.request_id, event.epoch, event.reason))]
        sequence.incoming.transfer_s += event.transfer_s
        return self.activate_if_complete(sequence)

    def activate_if_complete(self, sequence: Sequence) -> Outbox:
        """Activate the sequence once all its KV is present. Returns messages to send."""
        incoming = sequence.incoming
        if incoming is None or sequence.num_computed < incoming.start or not incoming.announced:
            return []
        if incoming.num_computed is None:
            return self._part_computed(sequence, incoming)
        if sequence.receiving:
            return []
        sequence.incoming, sequence.phase = None, Phase.RUNNING
        tables = self._table.tables
        sequence.num_computed = max(sequence.num_computed, incoming.num_computed)
        tables.register(sequence)
        first = sequence.num_reported
        sequence.num_reported = len(sequence.outputs)
        num_blocks = incoming.next_block - incoming.start // tables.block_size(sequence)
        received = KvReceived(
            sequence.request.id,
            sequence.epoch,
            first,
            tuple(sequence.outputs[first:]),
            sequence.logprobs_from(first),
            num_blocks * tables.block_bytes,
            incoming.transfer_s,
        )
        return [(SCHEDULER, received)]

    def _part_computed(self, sequence: Sequence, incoming: IncomingKv) -> Outbox:
        """Tell the source, once, that only the KV that it sends is missing: it may freeze."""
        if incoming.src_notified or not incoming.start:
            return []
        incoming.src_notified = True
        return [(incoming.src, PartComputed(sequence.request.id, sequence.epoch))]
