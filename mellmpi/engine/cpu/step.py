"""One forward pass, as every thread of the team runs it."""

import numpy as np
from numba import njit

from mellmpi.engine.cpu.attention import attend
from mellmpi.engine.cpu.disk_cache import kept
from mellmpi.engine.cpu.linear import ADD, GATE_UP, KEEP, WIDE_ELEMENTS, linear
from mellmpi.engine.cpu.packed_weights import PANEL
from mellmpi.engine.cpu.parallel_for import KERNEL, shares
from mellmpi.engine.cpu.rows import embed, normalise, place

PHASES = 8  # of a layer


def num_phases(layers: int) -> int:
    return PHASES * layers + 3


@kept
@njit(**KERNEL)
def step(team, tokens, last_rows, chunks, weights, sizes, heads, rotary, kv, scratch, logits):
    """KV of all rows into the arena, logits of the last rows into `logits`.

    tokens     int32 [rows]
    last_rows  int32 [sampled]
    rotary     float32 [positions, 2, half] flat (see `rows.place`)
    kv         storage type: the arena, flat
    logits     float32 [sampled, sizes.vocabulary] flat
    """
    rows, x, hidden = len(tokens), scratch.residual, sizes.hidden
    wide = np.empty(WIDE_ELEMENTS, np.float32)
    every_row, embedding_at = np.arange(rows), weights.begins[-1] * sizes.tied
    for first, last in shares(team, 0, rows):
        embed(
            first, last, tokens, weights.embedding, embedding_at, sizes.tied, sizes.size, hidden, x
        )
    for layer in range(sizes.layers):
        phase = 1 + PHASES * layer
        self_attention(
            team, phase, layer, every_row, chunks, weights, sizes, heads, rotary, kv, scratch, wide
        )
        mlp(team, phase + 5, layer, every_row, weights, sizes, heads.eps, scratch, wide)
    phase, wanted = 1 + PHASES * sizes.layers, len(last_rows)
    norm(team, phase, last_rows, 2 * sizes.layers, weights, sizes, heads.eps, scratch)
    project(
        team,
        phase + 1,
        4 * sizes.layers,
        scratch.normed,
        sizes.normed_stride,
        wanted,
        hidden,
        weights,
        sizes.vocabulary,
        KEEP,
        logits,
        sizes.vocabulary,
        sizes,
        wide,
    )


@njit(**KERNEL)
def norm(team, phase, rows, index, weights, sizes, eps, scratch):
    """normed = the model's RMSNorm of that number, of these rows of the residual."""
    hidden = sizes.hidden
    for first, last in shares(team, phase, len(rows)):
        normalise(
            first,
            last,
            rows,
            scratch.residual,
            sizes.size,
            hidden,
            weights.norms,
            index * hidden,
            eps,
            scratch.normed,
            sizes.normed_stride,
        )


@njit(**KERNEL)
def self_attention(
    team, phase, layer, every_row, chunks, weights, sizes, heads, rotary, kv, scratch, wide
):
    """residual += o(attention(qkv(norm(residual))))"""
    rows, hidden, width = len(every_row), sizes.hidden, heads.heads * heads.head_dim
    layer_at = layer * 2 * heads.kv_heads * heads.block_size * heads.head_dim
    norm(team, phase, every_row, 2 * layer, weights, sizes, heads.eps, scratch)
    project(
        team,
        phase + 1,
        4 * layer,
        scratch.normed,
        sizes.normed_stride,
        rows,
        hidden,
        weights,
        sizes.qkv,
        KEEP,
        scratch.qkv,
        sizes.qkv,
        sizes,
        wide,
    )
    for first, last in shares(team, phase + 2, rows):
        place(
            first,
            last,
            scratch.qkv,
            sizes.qkv,
            rotary,
            weights.head_norms,
            2 * layer * heads.head_dim,
            chunks,
            heads,
            scratch.queries,
            kv,
            layer_at,
        )
    for first, last in shares(team, phase + 3, chunks.cu_items[-1]):
        attend(
            first,
            last,
            scratch.queries,
            kv,
            layer_at,
            chunks,
            heads,
            scratch.attended,
            sizes.attended_stride,
        )
    project(
        team,
        phase + 4,
        4 * layer + 1,
        scratch.attended,
        sizes.attended_stride,
        rows,
        width,
        weights,
        hidden,
        ADD,
        scratch.residual,
        hidden,
        sizes,
        wide,
    )


@njit(**KERNEL)
def mlp(team, phase, layer, every_row, weights, sizes, eps, scratch, wide):
    """residual += down(SiLU(gate(norm(residual))) * up(norm(residual)))"""
    rows, hidden, inner = len(every_row), sizes.hidden, sizes.inner
    norm(team, phase, every_row, 2 * layer + 1, weights, sizes, eps, scratch)
    project(
        team,
        phase + 1,
        4 * layer + 2,
        scratch.normed,
        sizes.normed_stride,
        rows,
        hidden,
        weights,
        2 * inner,
        GATE_UP,
        scratch.inner,
        sizes.inner_stride,
        sizes,
        wide,
    )
    project(
        team,
        phase + 2,
        4 * layer + 3,
        scratch.inner,
        sizes.inner_stride,
        rows,
        inner,
        weights,
        hidden,
        ADD,
        scratch.residual,
        hidden,
        sizes,
        wide,
    )


@njit(**KERNEL)
def project(
    team, phase, matrix, a, a_stride, rows, k, weights, width, how, out, stride, sizes, wide
):
    """`linear` with the model's matrix of that number, `width` columns wide."""
    linear(
        team,
        phase,
        a,
        a_stride,
        rows,
        k,
        weights.matrices,
        weights.begins[matrix],
        width // PANEL,
        weights.biases,
        weights.bias_begins[matrix],
        how,
        out,
        stride,
        sizes.wide_from,
        wide,
    )
