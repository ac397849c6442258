"""All rows of a batch times one packed matrix, each tile handed on while it is still in cache."""

import numpy as np
from numba import njit

from mellmpi.engine.cpu.features import (
    HAS_BF16_DOT,
    MOST_ROWS,
    WIDE_ROWS,
    WIDE_VECTORS,
)
from mellmpi.engine.cpu.gemm import tile16, tile32
from mellmpi.engine.cpu.memory import even, load, odd, pair_of, store
from mellmpi.engine.cpu.packed_weights import PANEL
from mellmpi.engine.cpu.parallel_for import KERNEL, shares
from mellmpi.engine.cpu.vectors import LANES, exp2, fill, larger

MOST = MOST_ROWS[2]
WIDE_COLUMNS = WIDE_VECTORS * LANES  # of a tile over widened weights
PART = 512  # steps of k that are widened at once: 32 KB for 16 columns, the first-level cache
NEVER = 1 << 40  # rows
WIDE_BLOCK = 512 // WIDE_ROWS * WIDE_ROWS  # rows, at most, for which weights are widened once
WIDE_ELEMENTS = PART * WIDE_COLUMNS + WIDE_BLOCK * PANEL
WIDENS = not HAS_BF16_DOT  # numba leaves out what a constant of the module rules out
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
            m,
            a,
            row * a_stride,
            a_stride,
            w,
            w_at,
            PANEL * pair,
            places,
            0,
            1,
            1,
            steps,
            steps,
            bias,
            bias_at,
            0,
            tile,
            0,
            PANEL,
        )
        finish(how, tile, m, out, row, stride, panel)
        row, rows, tiles = row + m, rows - m, tiles - 1


@njit(**KERNEL)
def widen(w, at, count, wide):
    """wide [count, WIDE_COLUMNS] float32 = so many steps of some columns of a panel at w[at]."""
    for k in range(0, count, 2):
        for c in range(0, WIDE_COLUMNS, LANES):
            words = at + k * PANEL + 2 * c
            store(wide, k * WIDE_COLUMNS + c, even(w, words))
            store(wide, (k + 1) * WIDE_COLUMNS + c, odd(w, words))


@njit(**KERNEL)
def wide_tile(
    m, a, a_at, a_stride, w, w_at, w_step, places, count, init, init_at, init_stride, out, out_at
):
    """A tile over float32 weights, as wide as suits this CPU."""
    if WIDE_VECTORS == 1:
        tile16(
            m,
            a,
            a_at,
            a_stride,
            w,
            w_at,
            w_step,
            places,
            0,
            1,
            1,
            count,
            count,
            init,
            init_at,
            init_stride,
            out,
            out_at,
            PANEL,
        )
    else:
        tile32(
            m,
            a,
            a_at,
            a_stride,
            w,
            w_at,
            w_step,
            places,
            0,
            1,
            1,
            count,
            count,
            init,
            init_at,
            init_stride,
            out,
            out_at,
            PANEL,
        )


@njit(**KERNEL)
def multiply_wide(
    a, a_stride, row, rows, k, w, w_at, places, bias, bias_at, wide, sums, how, out, stride, panel
):
    """`multiply_rows` over weights as float32: those of bfloat16 are widened, once for all rows.

    Every sum adds the same products in the same order, and so has the same bits.

    wide  float32 [PART, WIDE_COLUMNS]
    sums  float32 [rows, PANEL]
    """
    places[1] = 0
    for column in range(0, PANEL, WIDE_COLUMNS):
        for first in range(0, k, PART):
            count = min(PART, k - first)
            if pair_of(w) == 2:
                widen(w, w_at + first * PANEL + 2 * column, count, wide)
                soon = w.ctypes.data + (w_at + (first + count) * PANEL) * w.itemsize
                places[1] = (soon - wide.ctypes.data) // wide.itemsize
            done, tiles = 0, (rows + WIDE_ROWS - 1) // WIDE_ROWS
            while tiles > 0:
                m = (rows - done + tiles - 1) // tiles
                a_at, to = (row + done) * a_stride + first, done * PANEL + column
                if pair_of(w) == 2 and first == 0:
                    wide_tile(
                        m,
                        a,
                        a_at,
                        a_stride,
                        wide,
                        0,
                        WIDE_COLUMNS,
                        places,
                        count,
                        bias,
                        bias_at + column,
                        0,
                        sums,
                        to,
                    )
                elif pair_of(w) == 2:
                    wide_tile(
                        m,
                        a,
                        a_at,
                        a_stride,
                        wide,
                        0,
                        WIDE_COLUMNS,
                        places,
                        count,
                        sums,
                        to,
                        PANEL,
                        sums,
                        to,
                    )
                elif first == 0:
                    wide_tile(
                        m,
                        a,
                        a_at,
                        a_stride,
                        w,
                        w_at + column,
                        PANEL,
                        places,
                        count,
                        bias,
                        bias_at + column,
                        0,
                        sums,
                        to,
                    )
                else:
                    wide_tile(
                        m,
                        a,
                        a_at,
                        a_stride,
                        w,
                        w_at + first * PANEL + column,
                        PANEL,
                        places,
                        count,
                        sums,
                        to,
                        PANEL,
                        sums,
                        to,
                    )
                done, tiles, places[1] = done + m, tiles - 1, 0
    finish(how, sums, rows, out, row, stride, panel)


@njit(**KERNEL)
def rows_a_block(row_bytes):
    return max(1, ROWS_BYTES // row_bytes // MOST) * MOST


@njit(**KERNEL)
def linear(
    team,
    phase,
    a,
    a_stride,
    rows,
    k,
    w,
    w_at,
    panels,
    bias,
    bias_at,
    how,
    out,
    stride,
    wide_from,
    wide,
):
    """KEEP, ADD or GATE_UP bias + a @ w for all rows and panels, shared among the threads.

    a          [rows, a_stride] as activations are stored, flat; the first k of a row count
    w, w_at    packed weights; this matrix begins at element `w_at` and has `panels` panels
    bias       float32 [.]; this matrix's begins at `bias_at`; the sums start with it
    out        [rows, stride], flat
    wide_from  rows from which weights are widened
    wide       float32 [WIDE_ELEMENTS], this thread's own
    """
    tile, places = np.empty(MOST * PANEL, np.float32), np.zeros(2, np.int64)
    is_wide = rows >= wide_from
    block = WIDE_BLOCK if is_wide else rows_a_block(a.itemsize * k)
    # Items are panels of one block of rows, then those of the next block.
    for first, last in shares(team, phase, panels * ((rows + block - 1) // block)):
        for item in range(first, last):
            panel, row = item % panels, item // panels * block
            count, at, bias_of = min(block, rows - row), panel * PANEL * k, panel * PANEL
            if WIDENS and is_wide:
                multiply_wide(
                    a,
                    a_stride,
                    row,
                    count,
                    k,
                    w,
                    w_at + at,
                    places,
                    bias,
                    bias_at + bias_of,
                    wide[: PART * WIDE_COLUMNS],
                    wide[PART * WIDE_COLUMNS :],
                    how,
                    out,
                    stride,
                    panel,
                )
            else:
                multiply_rows(
                    a,
                    a_stride,
                    row,
                    count,
                    k,
                    w,
                    w_at + at,
                    places,
                    bias,
                    bias_at + bias_of,
                    tile,
                    how,
                    out,
                    stride,
                    panel,
                )
