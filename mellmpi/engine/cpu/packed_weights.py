"""Weights packed once, at load: panels of 32 columns, in the order in which a step reads them.

A matrix [outputs, inputs] becomes [outputs / 32][inputs / pair][32][pair], where `pair` is 2 for
bfloat16 and 1 for float32 (see `tile`). Padding is zeros: it adds nothing to any sum.
"""

import mmap
from collections.abc import Iterable

import numpy as np
import torch

from mellmpi.engine.cpu.features import HAS_BF16_DOT

PANEL = 32  # columns
SLACK = 64 * 1024  # bytes after the end, for prefetches that run ahead


def padded(size: int, multiple: int = PANEL) -> int:
    return -(-size // multiple) * multiple


def spread(width: int, itemsize: int) -> int:
    """Elements from row to row of `tile`'s left operand: an odd number of cache lines.

    Rows a power of two apart would all fall into the same few lines of the first-level cache:
    2,048 bfloat16 inputs computed at 170 instead of 230 GFLOP/s.
    """
    lines = -(-width * itemsize // 64) | 1
    return lines * 64 // itemsize


def pair_of(dtype: torch.dtype) -> int:
    """Consecutive k that share one 32-bit word."""
    return 4 // dtype.itemsize


def storage(array: torch.Tensor) -> np.ndarray:
    """A CPU tensor as the kernels see it: float32, or uint16 for bfloat16. Shares memory."""
    if array.dtype == torch.bfloat16:
        return array.view(torch.int16).numpy().view(np.uint16)
    return array.numpy()


def activation_dtype(dtype: torch.dtype) -> np.dtype:
    """How the kernels store what weights and KV of this dtype are multiplied with.

    A CPU that multiplies bfloat16 takes its bits; others take the same numbers as float32.
    """
    if dtype != torch.bfloat16:
        return np.dtype(np.float32)
    return np.dtype(np.uint16 if HAS_BF16_DOT else np.uint32)


def activations(x: torch.Tensor) -> np.ndarray:
    """A tensor of weights' dtype, so stored. May share memory."""
    if activation_dtype(x.dtype) == np.uint32:
        return x.float().numpy().view(np.uint32)
    return storage(x)


def large_pages(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """[num_elements] zeros; where the system can, in pages large enough to spare the TLB."""
    size = padded(num_elements * dtype.itemsize + SLACK, 2 << 20)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)[: num_elements + SLACK // dtype.itemsize]


def pad_to(matrix: torch.Tensor, *shape: int) -> torch.Tensor:
    """The matrix with zeros appended on each axis up to `shape`."""
    if matrix.shape == shape:
        return matrix
    out = matrix.new_zeros(shape)
    out[tuple(slice(n) for n in matrix.shape)] = matrix
    return out


def to_panels(matrix: torch.Tensor) -> torch.Tensor:
    """[outputs, inputs], outputs a multiple of 32 and inputs of 2, in panel order (a view)."""
    outputs, inputs = matrix.shape
    pair = pair_of(matrix.dtype)
    return matrix.view(outputs // PANEL, PANEL, inputs // pair, pair).transpose(1, 2)


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Rows in turns of 16, so that one panel has what one vector of SiLU(gate) * up needs."""
    halves = [m.view(-1, PANEL // 2, *m.shape[1:]) for m in (gate, up)]
    return torch.stack(halves, dim=1).flatten(0, 2)


def packed(matrices: Iterable[torch.Tensor], sizes: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """All matrices in one piece of memory, in order.

    matrices  padded [outputs, inputs] of one dtype; taken one at a time, so that a generator
              needs memory for one
    sizes     elements of each
    returns   elements as the kernels see them, and int64 [matrices] where each begins
    """
    ends = np.cumsum([0, *sizes], dtype=np.int64)
    memory = None
    for begin, matrix in zip(ends[:-1], matrices, strict=True):
        if memory is None:
            memory = large_pages(int(ends[-1]), matrix.dtype)
        panels = to_panels(matrix)
        memory[begin : begin + matrix.numel()].view(panels.shape).copy_(panels)
    assert memory is not None, "a model without matrices"
    return storage(memory), ends[:-1]
