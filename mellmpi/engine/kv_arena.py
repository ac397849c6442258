"""The paged KV arena of a worker: block-major, so that blocks are sent without packing."""

import hashlib
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mellmpi.engine.device import synchronize
from mellmpi.protocol import ModelKv

LAYOUT_VERSION = 1  # of the order of axes inside a block


@dataclass(frozen=True, kw_only=True)
class KvGeometry:
    """The layout of a block of one model's KV: [layers, 2, kv_heads, block_size, head_dim]."""

    model: str  # served name
    dtype: torch.dtype
    num_layers: int
    num_kv_heads: int
    block_size: int  # tokens per block
    head_dim: int
    layout: str = "plain"  # the order of numbers inside a block; some model classes have their own
    slack: int = 0  # unused bytes at the end of a block, where models share an arena

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim

    @property
    def block_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize + self.slack

    @property
    def fingerprint(self) -> str:
        """Equal on two workers exactly if they can use each other's blocks."""
        facts = (LAYOUT_VERSION, self.layout, self.model, str(self.dtype), self.shape, self.slack)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def model_kv(self) -> ModelKv:
        return ModelKv(self.model, self.block_size, self.block_bytes)


def with_equal_blocks(geometries: Sequence[KvGeometry]) -> list[KvGeometry]:
    """The geometries with blocks of equal bytes, so that the models can share an arena.

    The largest block sets the size. Each other model's `block_size` is multiplied by the number of
    its blocks that fit; the remainder, less than half a block, is slack.
    """
    size = max(geometry.block_bytes for geometry in geometries)
    fitted = []
    for geometry in geometries:
        times = size // geometry.block_bytes
        slack = size - times * geometry.block_bytes
        fitted.append(replace(geometry, block_size=times * geometry.block_size, slack=slack))
    return fitted


def _host_memory(num_bytes: int) -> torch.Tensor:
    """Zeroed uint8 [num_bytes], page-aligned; pages become resident on first use.

    Large pages, because blocks are scattered and each page of 4 KiB would need a TLB entry.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(memory, np.uint8))


class KvArena:
    """`num_blocks` blocks of KV memory on one device; the batch scheduler allocates block ids.

    elements  the memory as numbers of the geometry's dtype, flat
    tensor    [num_blocks, layers, 2, kv_heads, block_size, head_dim], each block contiguous; 2 is
              K, V. Zeroed at first: padded attention reads unwritten slots, and 0 x NaN is NaN.
              Blocks of another model leave finite numbers too: they have the same dtype.
    address   address of block 0 in bytes; block i begins `i * block_bytes` after it
    """

    def __init__(self, geometry: KvGeometry, num_blocks: int, device: torch.device | str = "cpu"):
        device = torch.device(device)
        num_bytes = num_blocks * geometry.block_bytes
        memory = (
            _host_memory(num_bytes)
            if device.type == "cpu"
            else torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        )
        synchronize(device)  # zeroed before another stream receives into it
        self._lay_out(geometry, memory)

    def _lay_out(self, geometry: KvGeometry, memory: torch.Tensor) -> None:
        self.geometry, self.device, self._bytes = geometry, memory.device, memory
        self.num_blocks = len(memory) // geometry.block_bytes
        self.elements = memory.view(geometry.dtype)
        blocks = self.elements.view(self.num_blocks, -1)
        used = blocks[:, : int(np.prod(geometry.shape))]
        self.tensor = used.view(self.num_blocks, *geometry.shape)

    def view_as(self, geometry: KvGeometry) -> "KvArena":
        """The same blocks with another model's geometry.

        ValueError if the geometries differ in bytes of a block or in dtype.
        """
        ours = self.geometry
        if (geometry.block_bytes, geometry.dtype) != (ours.block_bytes, ours.dtype):
            raise ValueError(
                f"{geometry.model} has blocks of {geometry.block_bytes} bytes of {geometry.dtype}, "
                f"{ours.model} of {ours.block_bytes} bytes of {ours.dtype}"
            )
        arena = object.__new__(KvArena)
        arena._lay_out(geometry, self._bytes)
        return arena

    @property
    def block_bytes(self) -> int:
        return self.geometry.block_bytes

    @property
    def block_size(self) -> int:
        return self.geometry.block_size

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def address(self) -> int:
        return self._bytes.data_ptr()

    @property
    def fingerprint(self) -> str:
        return self.geometry.fingerprint

    def block(self, block_id: int) -> torch.Tensor:
        """uint8 [block_bytes]: a view of one block, on the arena's device."""
        return self._bytes[block_id * self.block_bytes :][: self.block_bytes]

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target), one pair after the other."""
        for source, target in pairs:
            self.tensor[target].copy_(self.tensor[source])
