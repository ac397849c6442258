"""Transfers of KV blocks from arena to arena: by messages, or read out of the sender's memory.

Knows no MPI: messages go over a `Channel`.
"""

from mellmpi.transport.blocks.block_mover import BlockMover
from mellmpi.transport.blocks.cross_memory import CmaProbe
from mellmpi.transport.blocks.devices import (
    CudaCopies,
    DeviceArena,
    Staged,
    device_buffers_work,
    staging_buffer_for,
)
from mellmpi.transport.blocks.framing import checksum
from mellmpi.transport.blocks.progress_thread import ProgressThread
from mellmpi.transport.blocks.staging import bytes_at

__all__ = [
    "BlockMover",
    "CmaProbe",
    "CudaCopies",
    "DeviceArena",
    "ProgressThread",
    "Staged",
    "bytes_at",
    "checksum",
    "device_buffers_work",
    "staging_buffer_for",
]
