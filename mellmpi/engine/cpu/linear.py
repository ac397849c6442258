"""Linear layers: all rows of a batch times one packed matrix, each block used while in cache."""

import numpy as np
from numba import njit

from mellmpi.engine.cpu.features import HAS_BF16_DOT, MR, WIDENED_MR, WIDENED_VECTORS
from mellmpi.engine.cpu.gemm import microkernel16, microkernel32
from mellmpi.engine.cpu.memory import even, load, odd, pair_of, store
from mellmpi.engine.cpu.packed_weights import NR
from mellmpi.engine.cpu.parallel_for import KERNEL, parallel_for
from mellmpi.engine.cpu.shapes import Parts, View
from mellmpi.engine.cpu.vectors import LANES, exp2, fill, larger

MR32 = MR[2]  # rows of `microkernel32`
WIDENED_NR = WIDENED_VECTORS * LANES  # columns of the micro-kernel over widened weights
wide_kernel = microkernel16 if WIDENED_VECTORS == 1 else microkernel32
KC = 512  # steps of k that are widened at once: 32 KB for 16 columns, the first-level cache
NEVER = 1 << 40  # rows
WIDENED_BLOCK = 512 // WIDENED_MR * WIDENED_MR  # most rows for which weights are widened once
WIDENED_ELEMENTS = KC * WIDENED_NR + WIDENED_BLOCK * NR
WIDENS = not HAS_BF16_DOT  # a constant, so that numba drops the branch where it is false
ROWS_BYTES = 256 * 1024  # activations that stay in the second-level cache beside a micro-panel
LEAST_GATE = np.float32(-87)  # SiLU is practically 0 here, and exp(-gate) still finite
LOG2E = np.float32(1.4426950408889634)
# Elements to prefetch ahead: fewer than FEW rows are bound by memory, more by arithmetic.
NEAR, FAR, FEW = 2048, 8192, 5
STORE, ADD, GATE_UP = 0, 1, 2  # the use of the sums


@njit(**KERNEL)
def finish(how, sums, rows, out, row, stride, panel):
    """Write the sums of one micro-panel, float32 [rows, NR], into `out` from row `row` on."""
    if how == STORE:
        store_sums(sums, rows, out, row, stride, panel)
    elif how == ADD:
        add_sums(sums, rows, out, row, stride, panel)
    else:
        store_gated(sums, rows, out, row, stride, panel)


@njit(**KERNEL)
def store_sums(sums, rows, out, row, stride, panel):
    """out [., stride] float32 = sums."""
    for r in range(rows):
        at = (row + r) * stride + panel * NR
        store(out, at, load(sums, r * NR))
        store(out, at + LANES, load(sums, r * NR + LANES))


@njit(**KERNEL)
def add_sums(sums, rows, out, row, stride, panel):
    """out [., stride] float32 += sums: the residual stream."""
    for r in range(rows):
        at = (row + r) * stride + panel * NR
        store(out, at, load(out, at) + load(sums, r * NR))
        store(out, at + LANES, load(out, at + LANES) + load(sums, r * NR + LANES))


@njit(**KERNEL)
def store_gated(sums, rows, out, row, stride, panel):
    """out [., stride] = SiLU(gate) * up; the first half of a micro-panel is gate (`interleaved`)"""
    one, scale, least = fill(np.float32(1)), fill(-LOG2E), fill(LEAST_GATE)
    for r in range(rows):
        gate = load(sums, r * NR)
        silu = gate / (one + exp2(larger(gate, least) * scale))
        store(out, (row + r) * stride + panel * LANES, silu * load(sums, r * NR + LANES))


@njit(**KERNEL)
def multiply(a, a_stride, row, rows, w, bias, matrix, panel, offsets, sums, how, out, stride):
    """One micro-panel times `rows` rows, in groups of nearly equal size.

    sums  float32 [MR32, NR]
    """
    pair, groups, k = pair_of(w), (rows + MR32 - 1) // MR32, matrix.inputs
    parts = Parts(0, 1, 1, k // pair, k // pair)
    w_view = View(matrix.at + panel * NR * k, NR * pair)
    bias_view, sums_view = View(matrix.bias_at + panel * NR, 0), View(0, NR)
    while groups > 0:
        m = (rows + groups - 1) // groups
        offsets[1] = NEAR if m < FEW else FAR
        a_view = View(row * a_stride, a_stride)
        microkernel32(m, a, a_view, w, w_view, offsets, parts, bias, bias_view, sums, sums_view)
        finish(how, sums, m, out, row, stride, panel)
        row, rows, groups = row + m, rows - m, groups - 1


@njit(**KERNEL)
def widen(w, at, count, widened):
    """widened [count, WIDENED_NR] float32 = `count` steps of columns of a micro-panel at w[at]."""
    for k in range(0, count, 2):
        for c in range(0, WIDENED_NR, LANES):
            words = at + k * NR + 2 * c
            store(widened, k * WIDENED_NR + c, even(w, words))
            store(widened, (k + 1) * WIDENED_NR + c, odd(w, words))


@njit(**KERNEL)
def multiply_widened(
    a, a_stride, row, rows, w, bias, matrix, panel, offsets, buffer, how, out, stride
):
    """`multiply` over float32 weights: those of bfloat16 are widened, once for all rows.

    Every sum adds the same products in the same order, and so has the same bits.

    buffer  float32 [WIDENED_ELEMENTS]: widened weights [KC, WIDENED_NR], then sums [rows, NR]
    """
    widened, sums = buffer[: KC * WIDENED_NR], buffer[KC * WIDENED_NR :]
    k, w_at = matrix.inputs, matrix.at + panel * NR * matrix.inputs
    offsets[1] = 0
    for column in range(0, NR, WIDENED_NR):
        start = View(matrix.bias_at + panel * NR + column, 0)
        for first in range(0, k, KC):
            count, view = min(KC, k - first), View(w_at + first * NR + column, NR)
            parts = Parts(0, 1, 1, count, count)
            if pair_of(w) == 2:
                widen(w, w_at + first * NR + 2 * column, count, widened)
                ahead = w.ctypes.data + (w_at + (first + count) * NR) * w.itemsize
                offsets[1] = (ahead - widened.ctypes.data) // widened.itemsize
                view = View(0, WIDENED_NR)
            done, groups = 0, (rows + WIDENED_MR - 1) // WIDENED_MR
            while groups > 0:
                m = (rows - done + groups - 1) // groups
                a_view = View((row + done) * a_stride + first, a_stride)
                to = View(done * NR + column, NR)
                # Not by another jitted function: its reference counts would cost 10 % of the time.
                if pair_of(w) == 2 and first == 0:
                    wide_kernel(m, a, a_view, widened, view, offsets, parts, bias, start, sums, to)
                elif pair_of(w) == 2:
                    wide_kernel(m, a, a_view, widened, view, offsets, parts, sums, to, sums, to)
                elif first == 0:
                    wide_kernel(m, a, a_view, w, view, offsets, parts, bias, start, sums, to)
                else:
                    wide_kernel(m, a, a_view, w, view, offsets, parts, sums, to, sums, to)
                done, groups, offsets[1] = done + m, groups - 1, 0
    finish(how, sums, rows, out, row, stride, panel)


@njit(**KERNEL)
def rows_per_block(row_bytes):
    return max(1, ROWS_BYTES // row_bytes // MR32) * MR32


@njit(**KERNEL)
def linear(threads, phase, a, a_stride, rows, w, bias, matrix, how, out, stride, buffer):
    """STORE, ADD or GATE_UP bias + a @ w for all rows of `matrix`, shared among the threads.

    a       activation type [rows, a_stride], flat; the first `matrix.inputs` of a row count
    w       packed weights
    bias    float32 [.]; the sums start with it
    out     [rows, stride], flat: float32, or activation type with GATE_UP
    buffer  float32 [WIDENED_ELEMENTS], this thread's own
    """
    sums, offsets = np.empty(MR32 * NR, np.float32), np.zeros(2, np.int64)
    widens, panels = rows >= matrix.widen_from, matrix.panels
    block = WIDENED_BLOCK if widens else rows_per_block(a.itemsize * matrix.inputs)
    # Items are the micro-panels of one block of rows, then those of the next block.
    for first, last in parallel_for(threads, phase, panels * ((rows + block - 1) // block)):
        for item in range(first, last):
            panel, row = item % panels, item // panels * block
            count = min(block, rows - row)
            if WIDENS and widens:
                multiply_widened(
                    a,
                    a_stride,
                    row,
                    count,
                    w,
                    bias,
                    matrix,
                    panel,
                    offsets,
                    buffer,
                    how,
                    out,
                    stride,
                )
            else:
                multiply(
                    a, a_stride, row, count, w, bias, matrix, panel, offsets, sums, how, out, stride
                )
