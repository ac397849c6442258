"""Physical KV blocks of one worker, as ids. The tensors are in the engine."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BlockKey = bytes


def root_key(model: str) -> BlockKey:
    """Parent key of a sequence's first block: equal tokens of two models get different keys."""
    return hashlib.blake2b(model.encode(), digest_size=16).digest()


def block_key(parent: BlockKey, tokens: Sequence[int]) -> BlockKey:
    """Key of a full block: a hash of its tokens and, through the parent, of all tokens before."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Reference-counted block ids, with prefix caching as in vLLM.

    A block is empty, held by one or more sequences, or cached: held by none, its content known.
    Cached blocks count as free. When no empty block is left they are evicted, least recently
    freed first.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._empty = list(range(num_blocks))[::-1]
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._ref_counts = [0] * num_blocks
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: dict[BlockKey, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._cached)

    def is_held(self, block: int) -> bool:
        return self._ref_counts[block] > 0

    def allocate(self, n: int) -> list[int] | None:
        """Return `n` block ids with a reference count of 1; None, changing nothing, if too few."""
        if n > self.num_free:
            return None
        ids = [self._empty.pop() if self._empty else self._evict() for _ in range(n)]
        for block in ids:
            self._ref_counts[block] = 1
        return ids

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    def free(self, ids: Sequence[int]) -> None:
        """Decrement the reference count of each of these blocks."""
        # The tail goes back first, so that shared prefixes are evicted last.
        for block in reversed(ids):
            assert self.is_held(block), f"block {block} freed twice"
            self._ref_counts[block] -= 1
            if not self._ref_counts[block]:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._empty.append(block)

    def register(self, block: int, key: BlockKey) -> None:
        """Record the content of a held, full block. Of equal blocks only the first is recorded."""
        assert self.is_held(block), f"block {block} is not held"
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block], self._block_of[key] = key, block

    def share(self, keys: Sequence[BlockKey]) -> list[int]:
        """Hold the blocks of the longest known prefix of `keys`. Returns their ids."""
        ids: list[int] = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            self._ref_counts[block] += 1
            self._cached.pop(block, None)
            ids.append(block)
        return ids
