"""Physical KV blocks of one worker, as ids. The tensors live in the engine."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BlockKey = bytes


def root_key(model: str) -> BlockKey:
    """What stands before the first block of a sequence: equal tokens of two models differ."""
    return hashlib.blake2b(model.encode(), digest_size=16).digest()


def block_key(parent: BlockKey, tokens: Sequence[int]) -> BlockKey:
    """Identity of a full block: its tokens and, through the parent, all tokens before it."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Blocks are free, held by one or more sequences, or kept: unheld, but their content known.

    Kept blocks count as free: they are evicted, least recently given back first, when no block
    without content is left.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._empty = list(range(num_blocks))[::-1]
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * num_blocks
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: dict[BlockKey, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._kept)

    def is_held(self, block: int) -> bool:
        return self._holders[block] > 0

    def take(self, n: int) -> list[int] | None:
        """Exactly `n` block ids, each held once, or None with the pool unchanged."""
        if n > self.num_free:
            return None
        ids = [self._empty.pop() if self._empty else self._evict() for _ in range(n)]
        for block in ids:
            self._holders[block] = 1
        return ids

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    def give(self, ids: Sequence[int]) -> None:
        """Let go of one hold on each of these blocks."""
        # The tail goes back first, so that shared prefixes are the last to be evicted.
        for block in reversed(ids):
            assert self.is_held(block), f"block {block} freed twice"
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._empty.append(block)

    def know(self, block: int, key: BlockKey) -> None:
        """Remember what a held, full block contains. The first block with a content wins."""
        assert self.is_held(block), f"block {block} is not held"
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block], self._block_of[key] = key, block

    def share(self, keys: Sequence[BlockKey]) -> list[int]:
        """Hold the blocks of the longest known prefix of `keys`; their ids."""
        ids: list[int] = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            self._holders[block] += 1
            self._kept.pop(block, None)
            ids.append(block)
        return ids
