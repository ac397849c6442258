"""Which of two ways to multiply is the faster one: measured once, kept for each kind of CPU."""

import time

import numpy as np
import torch
from numba import njit

from mellmpi.engine.cpu.disk_cache import kept, kept_number, one_at_a_time
from mellmpi.engine.cpu.features import HAS_AVX512, HAS_BF16_DOT
from mellmpi.engine.cpu.linear import KEEP, NEVER, WIDE_ELEMENTS, linear
from mellmpi.engine.cpu.packed_weights import PANEL, activations, packed
from mellmpi.engine.cpu.parallel_for import KERNEL, team

INPUTS, OUTPUTS = 576, 3072  # of a matrix that does not fit into the caches of one core
FEW, MANY = 8, 48  # rows
REPEATS = 5  # of each way, of which the fastest counts


@kept
@njit(**KERNEL)
def multiply(team, a, rows, w, bias, out, wide_from, wide):
    linear(
        team,
        0,
        a,
        INPUTS,
        rows,
        INPUTS,
        w,
        0,
        OUTPUTS // PANEL,
        bias,
        0,
        KEEP,
        out,
        OUTPUTS,
        wide_from,
        wide,
    )


def wide_from(dtype: torch.dtype) -> int:
    """Rows from which `linear` widens weights of this dtype."""
    if HAS_BF16_DOT or (dtype == torch.float32 and HAS_AVX512):
        return NEVER
    with one_at_a_time(multiply):
        return kept_number(f"wide_from_{dtype}".replace("torch.", ""), lambda: _measured(dtype))


def _measured(dtype: torch.dtype) -> int:
    """Where the two straight lines through the times of few and of many rows cross."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(OUTPUTS, INPUTS, generator=generator).to(dtype)
    a = activations(torch.randn(MANY, INPUTS, generator=generator).to(dtype)).ravel()
    w, _ = packed(iter([matrix]), [matrix.numel()])
    bias, out = np.zeros(OUTPUTS, np.float32), np.empty(MANY * OUTPUTS, np.float32)
    wide = np.empty(WIDE_ELEMENTS, np.float32)

    def took_s(rows: int, wide_from: int) -> float:
        times = []
        for _ in range(REPEATS):
            shared, _counters = team(1, 1)
            began_s = time.perf_counter()
            multiply(shared, a, rows, w, bias, out, wide_from, wide)
            times.append(time.perf_counter() - began_s)
        return min(times)

    few, many = (took_s(rows, 1) - took_s(rows, NEVER) for rows in (FEW, MANY))
    return crossing(few, many)


def crossing(few: float, many: float) -> int:
    """Rows from which the wide way takes less, given how much more it takes at FEW and at MANY."""
    if many >= 0:
        return NEVER
    if few <= 0:
        return FEW
    return round(FEW + (MANY - FEW) * few / (few - many))
