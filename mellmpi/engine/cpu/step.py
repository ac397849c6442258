"""One forward pass, as every thread runs it."""

import numpy as np
from numba import njit

from mellmpi.engine.cpu.attention import attend
from mellmpi.engine.cpu.disk_cache import cached_on_disk
from mellmpi.engine.cpu.linear import ADD, GATE_UP, STORE, WIDENED_ELEMENTS, linear
from mellmpi.engine.cpu.packed_weights import NR
from mellmpi.engine.cpu.parallel_for import KERNEL, parallel_for
from mellmpi.engine.cpu.rows import embed, rms_norm, write_kv
from mellmpi.engine.cpu.shapes import Matrix

PHASES = 8  # of a layer


def num_phases(layers: int) -> int:
    """Phases of a step, for `thread_group`."""
    return PHASES * layers + 3


@cached_on_disk
@njit(**KERNEL)
def step(threads, tokens, last_rows, chunks, weights, sizes, heads, rope, kv, scratch, logits):
    """Write the KV of all rows into the arena, and the logits of the last rows into `logits`.

    tokens     int32 [rows]
    last_rows  int32 [sampled]
    rope       float32 [positions, 2, half] flat (see `rows.write_kv`)
    kv         storage type: the arena, flat
    logits     float32 [sampled, sizes.vocabulary] flat
    """
    rows, x, hidden, size = len(tokens), scratch.residual, sizes.hidden, sizes.size
    buffer = np.empty(WIDENED_ELEMENTS, np.float32)
    every_row, tied, begin = np.arange(rows), sizes.tied, weights.begins[-1] * sizes.tied
    for first, last in parallel_for(threads, 0, rows):
        embed(first, last, tokens, weights.embedding, begin, tied, size, hidden, x)
    for layer in range(sizes.layers):
        at = 1 + PHASES * layer
        self_attention(
            threads, at, layer, every_row, chunks, weights, sizes, heads, rope, kv, scratch, buffer
        )
        mlp(threads, at + 5, layer, every_row, weights, sizes, heads.eps, scratch, buffer)
    at, sampled, width = 1 + PHASES * sizes.layers, len(last_rows), sizes.vocabulary
    norm(threads, at, last_rows, 2 * sizes.layers, weights, sizes, heads.eps, scratch)
    output = matrix_of(weights, sizes, 4 * sizes.layers, hidden, width)
    a, stride = scratch.normed, sizes.normed_stride
    project(threads, at + 1, output, a, stride, sampled, weights, STORE, logits, width, buffer)


@njit(**KERNEL)
def norm(threads, phase, rows, index, weights, sizes, eps, scratch):
    """normed = the model's RMSNorm number `index` of these rows of the residual stream."""
    x, size, hidden = scratch.residual, sizes.size, sizes.hidden
    out, stride, at = scratch.normed, sizes.normed_stride, index * sizes.hidden
    for first, last in parallel_for(threads, phase, len(rows)):
        rms_norm(first, last, rows, x, size, hidden, weights.norms, at, eps, out, stride)


@njit(**KERNEL)
def self_attention(
    threads, phase, layer, every_row, chunks, weights, sizes, heads, rope, kv, scratch, buffer
):
    """residual += o(attention(qkv(norm(residual))))"""
    rows, hidden, width = len(every_row), sizes.hidden, heads.heads * heads.head_dim
    layer_at = layer * 2 * heads.kv_heads * heads.block_size * heads.head_dim
    norm(threads, phase, every_row, 2 * layer, weights, sizes, heads.eps, scratch)
    matrix, columns = matrix_of(weights, sizes, 4 * layer, hidden, sizes.qkv), sizes.qkv
    a, a_stride, qkv, q = scratch.normed, sizes.normed_stride, scratch.qkv, scratch.queries
    project(threads, phase + 1, matrix, a, a_stride, rows, weights, STORE, qkv, columns, buffer)
    norms, norms_at = weights.head_norms, 2 * layer * heads.head_dim
    for first, last in parallel_for(threads, phase + 2, rows):
        write_kv(first, last, qkv, columns, rope, norms, norms_at, chunks, heads, q, kv, layer_at)
    out, stride, residual = scratch.attended, sizes.attended_stride, scratch.residual
    for first, last in parallel_for(threads, phase + 3, chunks.cu_items[-1]):
        attend(first, last, q, kv, layer_at, chunks, heads, out, stride)
    matrix = matrix_of(weights, sizes, 4 * layer + 1, width, hidden)
    project(threads, phase + 4, matrix, out, stride, rows, weights, ADD, residual, hidden, buffer)


@njit(**KERNEL)
def mlp(threads, phase, layer, every_row, weights, sizes, eps, scratch, buffer):
    """residual += down(SiLU(gate(norm(residual))) * up(norm(residual)))"""
    rows, hidden, inner = len(every_row), sizes.hidden, sizes.inner
    norm(threads, phase, every_row, 2 * layer + 1, weights, sizes, eps, scratch)
    gate_up = matrix_of(weights, sizes, 4 * layer + 2, hidden, 2 * inner)
    down = matrix_of(weights, sizes, 4 * layer + 3, inner, hidden)
    a, stride, b, b_stride = scratch.normed, sizes.normed_stride, scratch.inner, sizes.inner_stride
    x = scratch.residual
    project(threads, phase + 1, gate_up, a, stride, rows, weights, GATE_UP, b, b_stride, buffer)
    project(threads, phase + 2, down, b, b_stride, rows, weights, ADD, x, hidden, buffer)


@njit(**KERNEL)
def matrix_of(weights, sizes, index, inputs, outputs):
    """The model's matrix number `index`, packed as [outputs / NR, inputs, NR]."""
    begin, bias_begin = weights.begins[index], weights.bias_begins[index]
    return Matrix(begin, bias_begin, inputs, outputs // NR, sizes.widen_from)


@njit(**KERNEL)
def project(threads, phase, matrix, a, a_stride, rows, weights, how, out, stride, buffer):
    """`linear` with one matrix of the model."""
    w, bias = weights.matrices, weights.biases
    linear(threads, phase, a, a_stride, rows, w, bias, matrix, how, out, stride, buffer)
