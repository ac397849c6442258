"""Attention over the paged arena: a few query rows that share keys, over all positions they see.

Positions are taken in vectors of 16 that begin at multiples of 16 in any chunk: a row has one SIMD
vector of scores for each, the maximum is exact, and sums run over the vectors in order.
Vectors that a row does not see add exact zeros. So a row's result does not depend on the rows
beside it.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from mellmpi.engine.cpu.features import MR
from mellmpi.engine.cpu.gemm import microkernel16, microkernel32, microkernel64
from mellmpi.engine.cpu.memory import load, pair_of, store
from mellmpi.engine.cpu.parallel_for import KERNEL
from mellmpi.engine.cpu.shapes import Parts, View
from mellmpi.engine.cpu.vectors import LANES, exp2, fill, fma, inside, larger, largest, total

QUERIES = 16  # tokens of a chunk that make one item
AHEAD = 4  # vectors of positions to prefetch ahead, keys and then values: blocks are scattered
ROWS, ROWS64 = MR[1], MR[4]
MASKED = np.float32(-np.inf)
ZEROS = np.zeros(4 * LANES, np.float32)


class AttentionScratch(NamedTuple):
    """Memory of one thread for one group of query rows."""

    scores: np.ndarray  # float32 [ROWS, stride]
    exps: np.ndarray  # activation type [ROWS, stride]: exp(score - maximum)
    exp_sums: np.ndarray  # float32 [ROWS]
    sums: np.ndarray  # float32 [ROWS, head_dim]: values weighted by exps
    offsets: np.ndarray  # int64 [2 vectors + AHEAD]: of keys, then of values; see `kv_offsets`


def items_of(cu_chunks: np.ndarray, kv_heads: int) -> np.ndarray:
    """int64 [chunks + 1]: running count of items; an item is 16 tokens of a chunk and a KV head.

    cu_chunks  int32 [chunks + 1]
    """
    items = -(-np.diff(cu_chunks).astype(np.int64) // QUERIES) * kv_heads
    return np.concatenate([[0], np.cumsum(items)])


@njit(**KERNEL)
def scratch_for(num_positions, head_dim, q):
    vectors = num_positions // LANES + 2
    return AttentionScratch(
        np.empty(ROWS * vectors * LANES, np.float32),
        np.empty(ROWS * vectors * LANES, q.dtype),
        np.empty(ROWS, np.float32),
        np.empty(ROWS * head_dim, np.float32),
        np.empty(2 * vectors + AHEAD, np.int64),
    )


@njit(**KERNEL)
def attend(first, last, q, kv, layer_at, chunks, heads, out, out_stride):
    """out [rows, heads, head_dim] = softmax(scale * q k) v, each row over the positions it sees.

    first, last  items of `items_of`
    q            [kv_heads, rows, group, head_dim] activation type (see `rows.write_kv`)
    kv           the arena, flat; layer_at: the offset of this layer in a block
    out_stride   elements from row to row of out
    """
    group, chunk = heads.heads // heads.kv_heads, 0
    scratch = scratch_for(np.int64(chunks.context_lens.max()), heads.head_dim, q)
    for item in range(first, last):
        while item >= chunks.cu_items[chunk + 1]:
            chunk += 1
        begin, end = np.int64(chunks.cu_chunks[chunk]), np.int64(chunks.cu_chunks[chunk + 1])
        parts = (end - begin + QUERIES - 1) // QUERIES
        head, part = divmod(item - chunks.cu_items[chunk], parts)
        row, table = begin + part * QUERIES, chunks.tables[chunk]
        done, count = 0, min(QUERIES, end - row) * group
        left = (count + ROWS - 1) // ROWS
        while left > 0:
            m = (count - done + left - 1) // left
            attend_rows(
                m, row, done, head, q, kv, layer_at, chunks, table, heads, scratch, out, out_stride
            )
            done, left = done + m, left - 1


@njit(**KERNEL)
def attend_rows(
    m, row, done, head, q, kv, layer_at, chunks, table, heads, scratch, out, out_stride
):
    """Query rows done … done + m - 1, counted over (token, head of the group) from token `row`."""
    group, head_dim = heads.heads // heads.kv_heads, heads.head_dim
    start = np.int64(chunks.positions[row])
    low = max(start + done // group - heads.window + 1, 0) // LANES * LANES
    end = start + (done + m - 1) // group + 1
    vectors = (end - low + LANES - 1) // LANES
    stride = (vectors | 1) * LANES  # odd, as in `packed_weights.padded_stride`
    head_at = layer_at + head * heads.block_size * head_dim
    kv_offsets(vectors, low, table, head_at, heads, pair_of(kv), scratch.offsets)
    query_at = ((head * len(chunks.positions) + row) * group + done) * head_dim
    qk_scores(m, q, query_at, kv, vectors, stride, heads, scratch)
    for r in range(m):
        softmax(r, r * stride, vectors, low, start + (done + r) // group, heads, scratch)
    weighted_sum(m, kv, vectors, stride, (end - 1) % LANES + 1, head_dim, scratch)
    for r in range(m):
        token, member = divmod(done + r, group)
        at = (row + token) * out_stride + (head * group + member) * head_dim
        scale = fill(np.float32(1) / scratch.exp_sums[r])
        for d in range(0, head_dim, LANES):
            store(out, at + d, load(scratch.sums, r * head_dim + d) * scale)


@njit(**KERNEL)
def kv_offsets(vectors, low, table, head_at, heads, pair, offsets):
    """offsets = the start of the keys of each vector of positions, then of the values.

    The last one is repeated for prefetches beyond the end.
    """
    values_at = head_at + heads.kv_heads * heads.block_size * heads.head_dim
    for vector in range(vectors):
        block, slot = divmod(low + vector * LANES, heads.block_size)
        at = np.int64(table[block]) * heads.block_stride
        offsets[vector] = at + head_at + slot * pair
        offsets[vectors + vector] = at + values_at + slot * heads.head_dim
    for vector in range(2 * vectors, 2 * vectors + AHEAD):
        offsets[vector] = offsets[2 * vectors - 1]


@njit(**KERNEL)
def qk_scores(m, q, query_at, kv, vectors, stride, heads, scratch):
    """scores [m, stride] = q k for all vectors of positions."""
    pair, dim, offsets, scores = pair_of(kv), heads.head_dim, scratch.offsets, scratch.scores
    q_view, k_view, init = View(query_at, dim), View(0, heads.block_size * pair), View(0, 0)
    for vector in range(vectors):
        parts = Parts(vector, vector + AHEAD, 1, dim // pair, dim // pair)
        to = View(vector * LANES, stride)
        microkernel16(m, q, q_view, kv, k_view, offsets, parts, ZEROS, init, scores, to)


@njit(**KERNEL)
def softmax(r, at, vectors, low, position, heads, scratch):
    """exps = exp(scale * (scores - their maximum)) where row r may attend, else 0; exp_sums[r]."""
    scores, exps = scratch.scores, scratch.exps
    oldest = max(position - heads.window + 1, 0)
    best = fill(MASKED)
    for i in range(0, vectors * LANES, LANES):
        lanes = load(scores, at + i)
        if low + i < oldest or low + i + LANES > position + 1:
            lanes = inside(lanes, low + i, oldest, position, MASKED)
            store(scores, at + i, lanes)
        best = larger(best, lanes)
    scale = fill(heads.scale)
    top = fill(-largest(best) * heads.scale)
    exp_sum = fill(np.float32(0))
    for i in range(0, vectors * LANES, LANES):
        lanes = exp2(fma(load(scores, at + i), scale, top))
        store(exps, at + i, lanes)
        exp_sum = exp_sum + lanes
    scratch.exp_sums[r] = total(exp_sum)


@njit(**KERNEL)
def weighted_sum(m, kv, vectors, stride, in_last, head_dim, scratch):
    """sums [m, head_dim] = exps v over all vectors of positions, `in_last` of them in the last."""
    pair, exps, sums, offsets = pair_of(kv), scratch.exps, scratch.sums, scratch.offsets
    steps, last_steps, init = LANES // pair, (in_last + pair - 1) // pair, View(0, 0)
    parts = Parts(vectors, vectors + AHEAD, vectors, steps, last_steps)
    for row in range(0, m, ROWS64):
        rows, d = min(ROWS64, m - row), 0
        view = View(row * stride, stride)
        while d + 64 <= head_dim:
            v, to = View(d * pair, head_dim * pair), View(row * head_dim + d, head_dim)
            microkernel64(rows, exps, view, kv, v, offsets, parts, ZEROS, init, sums, to)
            d += 64
        if d + 32 <= head_dim:
            v, to = View(d * pair, head_dim * pair), View(row * head_dim + d, head_dim)
            microkernel32(rows, exps, view, kv, v, offsets, parts, ZEROS, init, sums, to)
            d += 32
        if d < head_dim:
            v, to = View(d * pair, head_dim * pair), View(row * head_dim + d, head_dim)
            microkernel16(rows, exps, view, kv, v, offsets, parts, ZEROS, init, sums, to)
