"""What one worker holds: its sequences, those that linger, and their blocks. Pure."""

from mellmpi.worker.kvcache import BlockTables
from mellmpi.worker.sequences import Sequence


class SequenceTable:
    """Keyed by epoch. Blocks in flight are nobody else's: their sequence lingers meanwhile."""

    def __init__(self, tables: BlockTables, fingerprints: dict[str, str]):
        self.tables, self.fingerprints = tables, fingerprints
        self.sequences: dict[int, Sequence] = {}  # oldest assignment first
        self.lingering: dict[int, Sequence] = {}  # ended, but a transfer touches their blocks

    def fingerprint(self, sequence: Sequence) -> str:
        """Of the layout of its KV."""
        return self.fingerprints[sequence.request.model]

    def end(self, sequence: Sequence) -> None:
        """It is over here; its blocks are given back, now or when no transfer touches them."""
        self.lingering[sequence.epoch] = self.sequences.pop(sequence.epoch)
        self.free(sequence)

    def free(self, sequence: Sequence) -> None:
        """Give the blocks of what has ended back, once no transfer touches them any more."""
        if not sequence.in_flight:
            self.tables.pool.give(sequence.block_table)
            del self.lingering[sequence.epoch]

    def landed(self, epoch: int, tag: int) -> Sequence | None:
        """A round no longer touches its blocks; the sequence, or None if that is over already."""
        ended = self.lingering.get(epoch)
        sequence = ended or self.sequences[epoch]
        for rounds in (sequence.sending, sequence.closing, sequence.receiving):
            rounds.discard(tag)
        if ended is not None:
            self.free(ended)
            return None
        return sequence
