"""The paged KV arena of one worker: block-major, so that whole blocks are sent in place."""

import hashlib
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mellmpi.engine.device import finish
from mellmpi.protocol import ModelKv

LAYOUT_VERSION = 1  # of the order of axes inside a block


@dataclass(frozen=True, kw_only=True)
class KvGeometry:
    """What one block of one model's KV looks like: [layers, 2, kv_heads, block_size, head_dim]."""

    model: str  # its served name
    dtype: torch.dtype
    num_layers: int
    num_kv_heads: int
    block_size: int  # tokens a block
    head_dim: int
    layout: str = "plain"  # the order of numbers inside a block, which a model may have of its own
    slack: int = 0  # bytes at the end of a block that nothing uses: models that share an arena

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim

    @property
    def block_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize + self.slack

    @property
    def fingerprint(self) -> str:
        """Equal on two workers exactly when one may use the other's blocks."""
        facts = (LAYOUT_VERSION, self.layout, self.model, str(self.dtype), self.shape, self.slack)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def model_kv(self) -> ModelKv:
        return ModelKv(self.model, self.block_size, self.block_bytes)


def shared(geometries: Sequence[KvGeometry]) -> list[KvGeometry]:
    """The same models with blocks of equal bytes, so that they can share an arena.

    The largest block sets the size; each of the others holds as many times its tokens as fit.
    What is left over, less than half of a block, is slack.
    """
    size = max(geometry.block_bytes for geometry in geometries)
    fitted = []
    for geometry in geometries:
        times = size // geometry.block_bytes
        slack = size - times * geometry.block_bytes
        fitted.append(replace(geometry, block_size=times * geometry.block_size, slack=slack))
    return fitted


def _host_memory(num_bytes: int) -> torch.Tensor:
    """Zeroed uint8 [num_bytes], page-aligned, resident only where it was used, unmapped when freed.

    Large pages: blocks lie scattered, and every 4 KiB page of them would cost a TLB entry.
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(memory, np.uint8))


class KvArena:
    """`num_blocks` blocks of KV memory on one device; whoever plans steps owns the block ids.

    elements  the memory as numbers, flat
    tensor    [num_blocks, layers, 2, kv_heads, block_size, head_dim], each block contiguous; 2 is
              K, V. Zeroed at first: padded attention reads slots nobody wrote, and 0 x NaN is NaN.
              Finite ever after: what another model left there is numbers of the same type.
    address   of block 0; block i begins `i * block_bytes` after it
    """

    def __init__(self, geometry: KvGeometry, num_blocks: int, device: torch.device | str = "cpu"):
        device = torch.device(device)
        num_bytes = num_blocks * geometry.block_bytes
        memory = (
            _host_memory(num_bytes)
            if device.type == "cpu"
            else torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        )
        finish(device)  # the zeros are there before what other streams receive
        self._lay_out(geometry, memory)

    def _lay_out(self, geometry: KvGeometry, memory: torch.Tensor) -> None:
        self.geometry, self.device, self._bytes = geometry, memory.device, memory
        self.num_blocks = len(memory) // geometry.block_bytes
        self.elements = memory.view(geometry.dtype)
        blocks = self.elements.view(self.num_blocks, -1)
        self.tensor = blocks[:, : int(np.prod(geometry.shape))].unflatten(1, geometry.shape)

    def seen_as(self, geometry: KvGeometry) -> "KvArena":
        """The same blocks, as another model sees them. ValueError where its blocks differ in bytes
        or in the type of their numbers."""
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
        """uint8 [block_bytes]: one block in place, on the arena's device."""
        return self._bytes[block_id * self.block_bytes :][: self.block_bytes]

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole blocks (from, to), one pair after the other."""
        for source, target in pairs:
            self.tensor[target].copy_(self.tensor[source])
