"""The sequences of one worker and their blocks. Pure."""

from mellmpi.worker.kvcache import BlockTables
from mellmpi.worker.sequences import Sequence


class SequenceTable:
    """Sequences by epoch. An ended sequence lingers until no transfer uses its blocks."""

    def __init__(self, tables: BlockTables, fingerprints: dict[str, str]):
        self.tables, self.fingerprints = tables, fingerprints  # fingerprints by model
        self.sequences: dict[int, Sequence] = {}  # oldest assignment first
        self.lingering: dict[int, Sequence] = {}  # ended, but a transfer still uses the blocks

    def fingerprint(self, sequence: Sequence) -> str:
        """Fingerprint of the sequence's KV layout."""
        return self.fingerprints[sequence.request.model]

    def end(self, sequence: Sequence) -> None:
        """Remove the sequence; its blocks are freed once no transfer uses them."""
        self.lingering[sequence.epoch] = self.sequences.pop(sequence.epoch)
        self._free_if_unused(sequence)

    def _free_if_unused(self, ended: Sequence) -> None:
        if not ended.in_flight:
            self.tables.pool.free(ended.block_table)
            del self.lingering[ended.epoch]

    def transfer_ended(self, epoch: int, tag: int) -> Sequence | None:
        """Record that transfer `tag` is over. Returns the sequence, or None if it has ended."""
        ended = self.lingering.get(epoch)
        sequence = ended or self.sequences[epoch]
        for tags in (sequence.sending, sequence.sending_partial, sequence.receiving):
            tags.discard(tag)
        if ended is not None:
            self._free_if_unused(ended)
            return None
        return sequence
