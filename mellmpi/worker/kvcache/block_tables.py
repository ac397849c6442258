"""Which blocks hold the KV of a sequence: tables grow, and known prefixes are shared. Pure."""

from collections.abc import Iterable

from mellmpi.protocol import ModelKv, blocks_for
from mellmpi.worker.kvcache.block_pool import (
    BlockKey,
    BlockPool,
    block_key,
    root_key,
)
from mellmpi.worker.sequences import Sequence


class BlockTables:
    """Gives the blocks of one pool to the sequences of all models of a worker.

    All blocks have the same bytes, so that what one model frees another can use. How many tokens
    a block holds is a matter of its model.
    """

    def __init__(self, models: Iterable[ModelKv], num_blocks: int, prefix_caching: bool):
        models = tuple(models)
        [self.block_bytes] = {kv.block_bytes for kv in models}
        sizes = {kv.model: kv.block_size for kv in models}
        self.pool = BlockPool(num_blocks)
        self._size, self._prefix_caching = sizes, prefix_caching
        self._root = {model: root_key(model) for model in sizes}

    def block_size(self, sequence: Sequence) -> int:
        """Tokens a block, of its model."""
        return self._size[sequence.request.model]

    def needed(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that hold so many positions of it."""
        return blocks_for(num_tokens, self._size[sequence.request.model])

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for `num_tokens` positions, all or none."""
        missing = self.needed(sequence, num_tokens) - len(sequence.block_table)
        ids = self.pool.take(max(0, missing))
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
        """Begin with the blocks whose content is what this sequence begins with."""
        if not self._prefix_caching:
            return
        # At least one position is left to compute: its logits are what comes next.
        self._extend_keys(sequence, sequence.num_tokens - 1)
        sequence.block_table = self.pool.share(sequence.keys)
        sequence.num_known = len(sequence.block_table)
        sequence.num_computed = sequence.num_known * self._size[sequence.request.model]

    def know(self, sequence: Sequence) -> None:
        """Remember the content of its full blocks, for others that begin alike."""
        if not self._prefix_caching:
            return
        self._extend_keys(sequence, sequence.num_computed)
        full = sequence.num_computed // self._size[sequence.request.model]
        for i in range(sequence.num_known, full):
            self.pool.know(sequence.block_table[i], sequence.keys[i])
        sequence.num_known = full
