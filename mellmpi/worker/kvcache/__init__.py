"""Which block of the KV arena holds what, as numbers.

Knows no bytes: the arena itself is in `engine`.
"""

from mellmpi.worker.kvcache.block_pool import BlockKey, BlockPool, block_key, root_key
from mellmpi.worker.kvcache.block_tables import BlockTables

__all__ = [
    "BlockKey",
    "BlockPool",
    "BlockTables",
    "block_key",
    "root_key",
]
