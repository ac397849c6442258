"""Sequences that leave: their blocks go out in rounds while they decode on. Pure.

A round is a header and the blocks that are full by then; full blocks are never written again. When
little is left, or rounds stop shrinking, one more step is made here. What will be left after it is
announced before it: the destination awaits these blocks, the half-full one among them, while it
computes, and then only has to be told the tokens and how far they have got.

Where the destination computes a part itself, all this goes on until it says that it has: what will
be left stays announced, goes as a round like others when it has become full, and the next is.
"""

from typing import Any

from mellmpi.protocol import DATA_PLANE, ROUNDS, Address, BlocksSent, KvPayload, SendBlocks, SendKv
from mellmpi.worker.sequence_table import SequenceTable
from mellmpi.worker.sequences import Phase, Sequence, Stream

FEW = 1  # full blocks: waiting for so little is no longer than another round

Commands = list[tuple[Address, Any]]


class KvSender:
    """Sends what the scheduler orders to be sent."""

    def __init__(self, table: SequenceTable):
        self._holdings = table
        self._announced: list[tuple[Sequence, SendBlocks]] = []  # to be sent in any case

    @property
    def closing(self) -> bool:
        """The last blocks of some sequence are announced."""
        return bool(self._announced)

    @property
    def leaving(self) -> bool:
        """Some sequence goes after the next step."""
        streams = (sequence.stream for sequence, _ in self._announced)
        return any(stream is not None and not stream.awaits_part for stream in streams)

    def begin(self, order: SendKv) -> Commands:
        """The first round."""
        sequence = self._holdings.sequences.get(order.epoch)
        if sequence is None:  # preempted or finished meanwhile; the scheduler will hear of it
            return []
        first = order.start // self._holdings.tables.block_size(sequence)
        sequence.stream = Stream(order.dst, order.dst_epoch, first, awaits_part=order.start > 0)
        return self._next_round(sequence, sequence.stream)

    def stop(self, sequence: Sequence) -> None:
        """The move came to nothing: decode on, and begin no further round."""
        sequence.stream, sequence.phase = None, Phase.RUNNING

    def sent(self, event: BlocksSent) -> Commands:
        """A round has left: the next one follows, unless it was the last or all is over."""
        if (sequence := self._holdings.landed(event.epoch, event.round)) is None:
            return []
        stream = sequence.stream
        if stream is None or sequence.phase is Phase.FROZEN or event.round != stream.tag:
            return []
        stream.round += 1
        return self._next_round(sequence, stream)

    def part_computed(self, dst_epoch: int) -> Commands:
        """The destination has computed its own part: nothing keeps us from stopping any more."""
        for sequence in self._holdings.sequences.values():
            stream = sequence.stream
            if stream is not None and stream.dst_epoch == dst_epoch:
                stream.awaits_part = False
                return self._go_if_ready(sequence, stream)
        return []  # it has ended, or the move has come to nothing

    def _go_if_ready(self, sequence: Sequence, stream: Stream) -> Commands:
        for entry in self._announced:
            if entry[0] is sequence:
                self._announced.remove(entry)
                return self._go(stream, *entry)
        if sequence.phase is Phase.FROZEN or stream.tag in sequence.sending:
            return []
        return self._next_round(sequence, stream)

    def _next_round(self, sequence: Sequence, stream: Stream) -> Commands:
        tables = self._holdings.tables
        full = sequence.num_computed // tables.block_size(sequence)
        unsent = full - stream.next_block
        if stream.round == ROUNDS - 1:  # with the last tag it goes, and not before it may
            return [] if stream.awaits_part else self._announce_last(sequence, stream)
        if unsent <= FEW or (unsent >= stream.num_before and not stream.awaits_part):
            return self._announce_last(sequence, stream)
        return self._round(sequence, stream, full, last=False)

    def _announce_last(self, sequence: Sequence, stream: Stream) -> Commands:
        """What will be left after the next step; or it goes at once, if it could make none."""
        tables, num_tokens = self._holdings.tables, sequence.num_tokens
        if num_tokens - sequence.num_computed > 1 or not tables.grow(sequence, num_tokens):
            return self._last_round(sequence, stream)
        end = tables.needed(sequence, num_tokens)
        [header, (_, blocks)] = self._round(sequence, stream, end, last=False)
        self._announced.append((sequence, blocks))
        return [header]

    def stepped(self) -> Commands:
        """A step is over: who was announced goes, or waits for the destination's own part."""
        announced, self._announced = self._announced, []
        commands: Commands = []
        for sequence, blocks in announced:
            stream = sequence.stream
            if stream is None or sequence.epoch not in self._holdings.sequences:
                commands.append(self._send_announced(sequence, blocks))
            elif not stream.awaits_part:
                commands += self._go(stream, sequence, blocks)
            elif self._is_full(sequence, stream):
                commands.append((DATA_PLANE, blocks))
            else:
                self._announced.append((sequence, blocks))
        return commands

    def _go(self, stream: Stream, sequence: Sequence, blocks: SendBlocks) -> Commands:
        """It stops; what was announced follows."""
        sequence.phase = Phase.FROZEN
        header = self._round(sequence, stream, stream.next_block, last=True)
        return [*header, self._send_announced(sequence, blocks)]

    def _is_full(self, sequence: Sequence, stream: Stream) -> bool:
        """Nothing that was announced will be written again."""
        announced = stream.next_block * self._holdings.tables.block_size(sequence)
        return sequence.num_computed >= announced

    def settle(self) -> Commands:
        """Who was announced and does not go: its blocks are awaited all the same."""
        live = self._holdings.sequences
        over = [a for a in self._announced if a[0].stream is None or a[0].epoch not in live]
        self._announced = [a for a in self._announced if a not in over]
        return [self._send_announced(*entry) for entry in over]

    def _send_announced(self, sequence: Sequence, blocks: SendBlocks) -> tuple[Address, Any]:
        sequence.closing.add(blocks.tag)
        return DATA_PLANE, blocks

    def _last_round(self, sequence: Sequence, stream: Stream) -> Commands:
        sequence.phase = Phase.FROZEN
        end = self._holdings.tables.needed(sequence, sequence.num_computed)
        commands = self._round(sequence, stream, end, last=True)
        sequence.closing |= sequence.sending & {stream.tag}
        return commands

    def _round(self, sequence: Sequence, stream: Stream, end: int, last: bool) -> Commands:
        """Announce and send all blocks up to `end` that have not been sent."""
        first, ids = stream.next_block, sequence.block_table[stream.next_block : end]
        stream.next_block, stream.num_before = end, len(ids)
        header = KvPayload(
            request_id=sequence.request.id,
            epoch=stream.dst_epoch,
            fingerprint=self._holdings.fingerprint(sequence),
            first_block=first,
            num_blocks=len(ids),
            num_computed=sequence.num_computed,
            outputs=tuple(sequence.outputs) if last else (),
            logprobs=tuple(sequence.logprobs.items()) if last else (),
            last=last,
            tag=stream.tag,
        )
        commands: Commands = [(stream.dst, header)]
        if ids:
            sequence.sending.add(stream.tag)
            blocks = SendBlocks(
                sequence.request.id, sequence.epoch, stream.dst, stream.tag, tuple(ids)
            )
            commands.append((DATA_PLANE, blocks))
        return commands
