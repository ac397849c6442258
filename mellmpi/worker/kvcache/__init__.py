"""Block ids of the KV arena: free, held by sequences, or cached for prefix reuse.

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
