"""Execution of step plans on one device: weights, KV arena, forward pass, sampling.

Knows of a request only its chunk in a step; knows no other rank and no policy.
"""

from mellmpi.engine.device import choose_device, kv_budget_bytes, synchronize
from mellmpi.engine.executor import Executor, build_executor
from mellmpi.engine.kv_arena import KvArena, KvGeometry
from mellmpi.engine.packing import PackedBatch, pack
from mellmpi.engine.sharing import build_engine

__all__ = [
    "Executor",
    "KvArena",
    "KvGeometry",
    "PackedBatch",
    "build_engine",
    "build_executor",
    "choose_device",
    "kv_budget_bytes",
    "pack",
    "synchronize",
]
