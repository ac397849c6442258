"""All rows of a batch times one packed matrix, each tile handed on while it is still in cache."""

import numpy as np
from numba import njit

from mellmpi.engine.kernels.panels import PANEL
from mellmpi.engine.kernels.team import KERNEL, shares
from mellmpi.engine.kernels.tile import MOST_ROWS, tile32
from mellmpi.engine.kernels.vectors import LANES, exp2, fill, larger, load, pair_of, store

MOST = MOST_ROWS[2]
ROWS_BYTES = 256 * 1024  # of activations that stay in the second-level cache beside a panel
LEAST_GATE = np.float32(-87)  # where SiLU is as good as 0 and exp(-gate) still finite
LOG2E = np.float32(1.4426950408889634)
# Elements to prefetch ahead: fewer than FEW rows wait for memory, more compute.
NEAR, FAR, FEW = 2048, 8192, 5
KEEP, ADD, GATE_UP = 0, 1, 2  # what becomes of a tile


@njit(**KERNEL)
def finish(how, tile, rows, out, row, stride, panel):
    if how == KEEP:
        keep(tile, rows, out, row, stride, panel)
    elif how == ADD:
        add_to(tile, rows, out, row, stride, panel)
    else:
        gate_up(tile, rows, out, row, stride, panel)


@njit(**KERNEL)
def keep(tile, rows, out, row, stride, panel):
    """out [., stride] float32 = tile."""
    for r in range(rows):
        at = (row + r) * stride + panel * PANEL
        store(out, at, load(tile, r * PANEL))
        store(out, at + LANES, load(tile, r * PANEL + LANES))


@njit(**KERNEL)
def add_to(tile, rows, out, row, stride, panel):
    """out [., stride] float32 += tile: the residual stream."""
    for r in range(rows):
        at = (row + r) * stride + panel * PANEL
        store(out, at, load(out, at) + load(tile, r * PANEL))
        store(out, at + LANES, load(out, at + LANES) + load(tile, r * PANEL + LANES))


@njit(**KERNEL)
def gate_up(tile, rows, out, row, stride, panel):
    """out [., stride] = SiLU(gate) * up, of panels whose first half is gate (`interleaved`)."""
    one, scale, least = fill(np.float32(1)), fill(-LOG2E), fill(LEAST_GATE)
    for r in range(rows):
        gate = load(tile, r * PANEL)
        silu = gate / (one + exp2(larger(gate, least) * scale))
        store(out, (row + r) * stride + panel * LANES, silu * load(tile, r * PANEL + LANES))


@njit(**KERNEL)
def multiply_rows(
    a, a_stride, row, rows, k, w, w_at, places, bias, bias_at, tile, how, out, stride, panel
):
    """One panel, for rows in tiles of nearly equal size."""
    pair, tiles = pair_of(w), (rows + MOST - 1) // MOST
    steps = k // pair
    while tiles > 0:
        m = (rows + tiles - 1) // tiles
        places[1] = NEAR if m < FEW else FAR
        tile32(
            m, a, row * a_stride, a_stride, w, w_at, PANEL * pair, places, 0, 1, 1, steps, steps,
            bias, bias_at, 0, tile, 0, PANEL,
        )  # fmt: skip
        finish(how, tile, m, out, row, stride, panel)
        row, rows, tiles = row + m, rows - m, tiles - 1


@njit(**KERNEL)
def rows_a_block(row_bytes):
    return max(1, ROWS_BYTES // row_bytes // MOST) * MOST


@njit(**KERNEL)
def linear(team, phase, a, a_stride, rows, k, w, w_at, panels, bias, bias_at, how, out, stride):
    """KEEP, ADD or GATE_UP bias + a @ w for all rows and panels, shared among the threads.

    a          [rows, a_stride] in the storage type, flat; the first k of a row count
    w, w_at    packed weights; this matrix begins at element `w_at` and has `panels` panels
    bias       float32 [.]; this matrix's begins at `bias_at`; the sums start with it
    out        [rows, stride], flat
    """
    tile, places = np.empty(MOST * PANEL, np.float32), np.zeros(2, np.int64)
    block = rows_a_block(4 * k // pair_of(w))
    # Items are panels of one block of rows, then those of the next block.
    for first, last in shares(team, phase, panels * ((rows + block - 1) // block)):
        for item in range(first, last):
            panel, row = item % panels, item // panels * block
            multiply_rows(
                a, a_stride, row, min(block, rows - row), k, w, w_at + panel * PANEL * k, places,
                bias, bias_at + panel * PANEL, tile, how, out, stride, panel,
            )  # fmt: skip
