"""Packed weights: micro-panels of NR = 32 columns, in the order in which a step reads them.

A matrix [outputs, inputs] becomes [outputs / 32][inputs / pair][32][pair], where `pair` is 2 for
bfloat16 and 1 for float32 (see `gemm`). Weights are packed once, when they are loaded. Padding is
zeros: it adds nothing to any sum.
"""

import mmap
from collections.abc import Iterable

import numpy as np
import torch

from mellmpi.engine.cpu.features import HAS_BF16_DOT

NR = 32  # columns of a micro-panel (BLIS)
SLACK = 64 * 1024  # bytes after the end, for prefetches beyond it


def padded(size: int, multiple: int = NR) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def padded_stride(width: int, itemsize: int) -> int:
    """Elements from row to row of activations of `width` elements: an odd number of cache lines.

    Rows a power of two apart would compete for the same few sets of the first-level cache:
    2,048 bfloat16 inputs computed at 170 instead of 230 GFLOP/s.
    """
    lines = -(-width * itemsize // 64) | 1
    return lines * 64 // itemsize


def pair_of(dtype: torch.dtype) -> int:
    """Consecutive elements along k that share one 32-bit word: 2 of bfloat16, 1 of float32."""
    return 4 // dtype.itemsize


def storage(array: torch.Tensor) -> np.ndarray:
    """A CPU tensor as a numpy array of the same memory: float32, or uint16 for bfloat16."""
    if array.dtype == torch.bfloat16:
        return array.view(torch.int16).numpy().view(np.uint16)
    return array.numpy()


def activation_dtype(dtype: torch.dtype) -> np.dtype:
    """The dtype in which kernels store activations, given that of weights and KV.

    uint16 (the bits of bfloat16) on a CPU that multiplies bfloat16, else uint32 (the same numbers
    as float32); float32 for float32.
    """
    if dtype != torch.bfloat16:
        return np.dtype(np.float32)
    return np.dtype(np.uint16 if HAS_BF16_DOT else np.uint32)


def activations(x: torch.Tensor) -> np.ndarray:
    """A tensor of the weights' dtype as `activation_dtype` of the same shape. May share memory."""
    if activation_dtype(x.dtype) == np.uint32:
        return x.float().numpy().view(np.uint32)
    return storage(x)


def large_pages(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [num_elements + SLACK bytes]; in large pages where the system has them, for the TLB."""
    size = padded(num_elements * dtype.itemsize + SLACK, 2 << 20)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)[: num_elements + SLACK // dtype.itemsize]


def pad_to(matrix: torch.Tensor, *shape: int) -> torch.Tensor:
    """The matrix with zeros appended on each axis up to `shape`; itself if it has that shape."""
    if matrix.shape == shape:
        return matrix
    out = matrix.new_zeros(shape)
    out[tuple(slice(n) for n in matrix.shape)] = matrix
    return out


def to_micro_panels(matrix: torch.Tensor) -> torch.Tensor:
    """A view [outputs / NR, inputs / pair, NR, pair] of a matrix [outputs, inputs].

    outputs must be a multiple of NR, and inputs of pair.
    """
    outputs, inputs = matrix.shape
    pair = pair_of(matrix.dtype)
    return matrix.view(outputs // NR, NR, inputs // pair, pair).transpose(1, 2)


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Alternate 16 rows of gate and 16 of up: one micro-panel gives 16 of SiLU(gate) * up.

    gate, up  [inner] or [inner, inputs]; returns [2 inner] or [2 inner, inputs]
    """
    halves = [m.view(-1, NR // 2, *m.shape[1:]) for m in (gate, up)]
    return torch.stack(halves, dim=1).flatten(0, 2)


def packed(matrices: Iterable[torch.Tensor], sizes: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pack matrices into one array, in order.

    matrices  padded [outputs, inputs] of one dtype; packed one at a time, so that a generator
              needs memory for one only
    sizes     elements of each
    returns   the packed weights (see `storage`), flat, and int64 [matrices]: the start of each
    """
    ends = np.cumsum([0, *sizes], dtype=np.int64)
    memory = None
    for begin, matrix in zip(ends[:-1], matrices, strict=True):
        if memory is None:
            memory = large_pages(int(ends[-1]), matrix.dtype)
        view = to_micro_panels(matrix)
        memory[begin : begin + matrix.numel()].view(view.shape).copy_(view)
    assert memory is not None, "a model without matrices"
    return storage(memory), ends[:-1]
