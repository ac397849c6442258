"""Sequences that come: their blocks are received in rounds, or computed here, or were here. Pure.

Each round is announced by a header; what nobody wants any more is still taken off the wire. The
sequence decodes on as soon as the last round is in place and its own part is computed.
"""

from typing import Any

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
from mellmpi.worker.sequence_table import SequenceTable
from mellmpi.worker.sequences import Arrival, Phase, Sequence

FEW = 2  # blocks of a round after which the source stops soon: a full and a half-full one

Commands = list[tuple[Address, Any]]


class KvReceiver:
    """Receives what the scheduler has announced."""

    def __init__(self, table: SequenceTable):
        self._holdings = table

    def reserve(self, order: ReceiveKv) -> Commands:
        """Set blocks aside, or refuse; say from where on it has to be sent."""
        table, tables = self._holdings, self._holdings.tables
        outputs = list(order.outputs)
        sequence = Sequence(order.request, order.epoch, outputs, [], Phase.ARRIVING)
        sequence.num_reported = order.num_logged
        tables.reuse_prefix(sequence)
        if not tables.grow(sequence, order.num_tokens):
            tables.pool.give(sequence.block_table)
            return [(SCHEDULER, KvRefused(order.request.id, order.epoch))]
        start = max(order.start, sequence.num_computed)
        size = tables.block_size(sequence)
        # The last block always comes: what is computed here is never sampled from.
        assert start % size == 0 and start < order.num_tokens, f"a split at {start}: {order}"
        sequence.arrival = Arrival(order.src, start, start // size)
        table.sequences[order.epoch] = sequence
        return [(SCHEDULER, KvReserved(order.request.id, order.epoch, start))]

    def announced(self, source: Address, header: KvPayload) -> Commands:
        """A round follows."""
        assert isinstance(source, int)
        sequence = self._holdings.sequences.get(header.epoch)
        if sequence is None or sequence.arrival is None:
            # Released before it came: take it off the wire, nothing more.
            return self._drain(source, header)
        if (why := self._mismatch(sequence, sequence.arrival, header)) is not None:
            self._holdings.end(sequence)
            failed = KvFailed(header.request_id, header.epoch, why)
            return [*self._drain(source, header), (SCHEDULER, failed)]
        arrival = sequence.arrival
        arrival.announced = True
        arrival.closing = header.last or header.num_blocks <= FEW
        first, arrival.next_block = arrival.next_block, arrival.next_block + header.num_blocks
        if header.last:
            sequence.outputs, sequence.logprobs = list(header.outputs), dict(header.logprobs)
            arrival.num_computed = header.num_computed
        if not header.num_blocks:
            return self.complete(sequence)
        sequence.receiving.add(header.tag)
        ids = tuple(sequence.block_table[first : arrival.next_block])
        receive = ReceiveBlocks(header.request_id, header.epoch, source, header.tag, ids)
        return [(DATA_PLANE, receive), *self.complete(sequence)]

    def _mismatch(self, sequence: Sequence, arrival: Arrival, header: KvPayload) -> str | None:
        ours = self._holdings.fingerprint(sequence)
        if header.fingerprint != ours:
            return f"KV layout {header.fingerprint} is not ours ({ours})"
        if header.first_block != arrival.next_block:
            return f"blocks from {header.first_block} on, not from {arrival.next_block}"
        # It may have grown since the reservation was made.
        tables = self._holdings.tables
        known = (arrival.next_block + header.num_blocks) * tables.block_size(sequence)
        if header.last:
            known = len(sequence.request.prompt) + len(header.outputs)
        return None if tables.grow(sequence, known) else "no room for what it has grown by"

    def _drain(self, source: int, header: KvPayload) -> Commands:
        drain = DrainBlocks(source, header.tag, header.num_blocks)
        return [(DATA_PLANE, drain)] if header.num_blocks else []

    @property
    def closing(self) -> bool:
        """A sequence needs only blocks that are on their way, and its source stops soon."""
        arrivals = ((s, s.arrival) for s in self._holdings.sequences.values())
        return any(a is not None and a.closing and s.num_computed >= a.start for s, a in arrivals)

    def arrived(self, event: BlocksArrived) -> Commands:
        """A round is in place, or never will be."""
        if (sequence := self._holdings.landed(event.epoch, event.round)) is None:
            return []
        assert sequence.arrival is not None, f"{event} for what is complete"
        if not event.ok:
            self._holdings.end(sequence)
            return [(SCHEDULER, KvFailed(event.request_id, event.epoch, event.reason))]
        sequence.arrival.transfer_s += event.transfer_s
        return self.complete(sequence)

    def complete(self, sequence: Sequence) -> Commands:
        """If nothing is missing any more, it is ours and decodes on; what has to be said of it."""
        arrival = sequence.arrival
        if arrival is None or sequence.num_computed < arrival.start or not arrival.announced:
            return []
        if arrival.num_computed is None:
            return self._part_computed(sequence, arrival)
        if sequence.receiving:
            return []
        sequence.arrival, sequence.phase = None, Phase.RUNNING
        tables = self._holdings.tables
        sequence.num_computed = max(sequence.num_computed, arrival.num_computed)
        tables.know(sequence)
        first = sequence.num_reported
        sequence.num_reported = len(sequence.outputs)
        num_blocks = arrival.next_block - arrival.start // tables.block_size(sequence)
        received = KvReceived(
            sequence.request.id,
            sequence.epoch,
            first,
            tuple(sequence.outputs[first:]),
            sequence.logprobs_from(first),
            num_blocks * tables.block_bytes,
            arrival.transfer_s,
        )
        return [(SCHEDULER, received)]

    def _part_computed(self, sequence: Sequence, arrival: Arrival) -> Commands:
        """The source goes on until it hears that nothing is missing but what it sends."""
        if arrival.told or not arrival.start:
            return []
        arrival.told = True
        return [(arrival.src, PartComputed(sequence.request.id, sequence.epoch))]
