"""Which of the two ways to multiply is faster: measured once for each kind of CPU, then cached."""

import time

import numpy as np
import torch
from numba import njit

from mellmpi.engine.cpu.disk_cache import cached_number, cached_on_disk, compile_lock
from mellmpi.engine.cpu.features import HAS_AVX512, HAS_BF16_DOT
from mellmpi.engine.cpu.linear import NEVER, STORE, WIDENED_ELEMENTS, linear
from mellmpi.engine.cpu.packed_weights import NR, activations, packed
from mellmpi.engine.cpu.parallel_for import KERNEL, thread_group
from mellmpi.engine.cpu.shapes import Matrix

INPUTS, OUTPUTS = 576, 3072  # of a matrix that does not fit into the caches of one core
FEW, MANY = 8, 48  # rows
REPEATS = 5  # of each way; the fastest counts


@cached_on_disk
@njit(**KERNEL)
def multiply(threads, a, rows, w, bias, matrix, out, buffer):
    linear(threads, 0, a, INPUTS, rows, w, bias, matrix, STORE, out, OUTPUTS, buffer)


def widen_from(dtype: torch.dtype) -> int:
    """Rows from which `linear` widens weights of this dtype; `NEVER` if that is never faster."""
    if HAS_BF16_DOT or (dtype == torch.float32 and HAS_AVX512):
        return NEVER
    with compile_lock(multiply):
        return cached_number(f"widen_from_{dtype}".replace("torch.", ""), lambda: _measured(dtype))


def _measured(dtype: torch.dtype) -> int:
    """The crossing of the two straight lines through the times of few and of many rows."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(OUTPUTS, INPUTS, generator=generator).to(dtype)
    a = activations(torch.randn(MANY, INPUTS, generator=generator).to(dtype)).ravel()
    w, _ = packed(iter([weights]), [weights.numel()])
    bias, out = np.zeros(OUTPUTS, np.float32), np.empty(MANY * OUTPUTS, np.float32)
    buffer = np.empty(WIDENED_ELEMENTS, np.float32)

    def took_s(rows: int, start: int) -> float:
        times, matrix = [], Matrix(0, 0, INPUTS, OUTPUTS // NR, start)
        for _ in range(REPEATS):
            threads, _counters = thread_group(1, 1)
            began_s = time.perf_counter()
            multiply(threads, a, rows, w, bias, matrix, out, buffer)
            times.append(time.perf_counter() - began_s)
        return min(times)

    few, many = (took_s(rows, 1) - took_s(rows, NEVER) for rows in (FEW, MANY))
    return crossing(few, many)


def crossing(few: float, many: float) -> int:
    """Rows from which widening is faster, given its additional seconds at FEW and at MANY rows."""
    if many >= 0:
        return NEVER
    if few <= 0:
        return FEW
    return round(FEW + (MANY - FEW) * few / (few - many))
