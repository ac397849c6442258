"""Block tables of sequences: they grow, and known prefixes are shared. Pure."""

from collections.abc import Iterable

from mellmpi.protocol import ModelKv, blocks_for
from mellmpi.worker.kvcache.block_pool import BlockKey, BlockPool, block_key, root_key
from mellmpi.worker.sequences import Sequence


class BlockTables:
    """Allocates the blocks of one pool to the sequences of all models of a worker.

    All blocks have the same size in bytes, so that models can use each other's free blocks. The
    number of tokens in a block depends on the model.
    """

    def __init__(self, models: Iterable[ModelKv], num_blocks: int, prefix_caching: bool):
        models = tuple(models)
        [self.block_bytes] = {kv.block_bytes for kv in models}
        sizes = {kv.model: kv.block_size for kv in models}
        self.pool = BlockPool(num_blocks)
        self._size, self.prefix_caching = sizes, prefix_caching
        self._root = {model: root_key(model) for model in sizes}

    def block_size(self, sequence: Sequence) -> int:
        """Tokens per block of the sequence's model."""
        return self._size[sequence.request.model]

    def blocks_needed(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions of the sequence."""
        return blocks_for(num_tokens, self._size[sequence.request.model])

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the block table to `num_tokens` positions. False, changing nothing, if full."""
        missing = self.blocks_needed(sequence, num_tokens) - len(sequence.block_table)
        ids = self.pool.allocate(max(0, missing))
        if ids is not None:
            sequence.block_table += ids
        return ids is not None

    def _extend_keys(self, sequence: Sequence, num_tokens: int) -> None:
        model = sequence.request.model
        size, keys = self._size[model], sequence.keys
        for i in range(len(keys), num_tokens // size):
            parent: BlockKey = keys[-1] if keys else self._root[model]
            keys.append(block_key(parent, sequence.token_range(i * size, (i + 1) * size)))

    def reuse_prefix(self, sequence: Sequence) -> None:
        """Begin the block table of a new sequence with blocks that hold its prefix already."""
        if not self.prefix_caching:
            return
        # At least one position must be computed: the next token is sampled from its logits.
        self._extend_keys(sequence, sequence.num_tokens - 1)
        sequence.block_table = self.pool.share(sequence.keys)
        sequence.num_registered = len(sequence.block_table)
        sequence.num_computed = sequence.num_registered * self._size[sequence.request.model]

    def register(self, sequence: Sequence) -> None:
        """Record the content of the sequence's full blocks, for prefix reuse."""
        if not self.prefix_caching:
            return
        self._extend_keys(sequence, sequence.num_computed)
        full = sequence.num_computed // self._size[sequence.request.model]
        for i in range(sequence.num_registered, full):
            self.pool.register(sequence.block_table[i], sequence.keys[i])
        sequence.num_registered = full
