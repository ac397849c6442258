"""Attention over the paged arena: a few rows of queries that share keys, against all they may see.

Positions are taken in tiles of 16 that begin at multiples of 16, whatever the chunk: scores of a
tile are one vector a row, the maximum is exact, and the sums run over tiles in order. Tiles that a
row does not see add exact zeros. So a row's result does not depend on the rows beside it.
"""

import numpy as np
from numba import njit

from mellmpi.engine.kernels.team import KERNEL
from mellmpi.engine.kernels.tile import MOST_ROWS, tile16, tile32, tile64
from mellmpi.engine.kernels.vectors import (
    LANES,
    exp2,
    fill,
    fma,
    inside,
    larger,
    largest,
    load,
    pair_of,
    store,
    total,
)

AHEAD = 4 * LANES  # positions whose keys or values are prefetched: blocks lie scattered
QUERIES = 16  # tokens of a chunk that make one item
ROWS, WIDE_ROWS = MOST_ROWS[1], MOST_ROWS[4]
NOTHING = np.float32(-np.inf)
ZEROS = np.zeros(LANES, np.float32)


def items_of(cu_chunks: np.ndarray, kv_heads: int) -> np.ndarray:
    """int64 [chunks + 1]: running count of items, which are 16 tokens of a chunk and a KV head."""
    items = -(-np.diff(cu_chunks).astype(np.int64) // QUERIES) * kv_heads
    return np.concatenate([[0], np.cumsum(items)])


@njit(**KERNEL)
def attend(first, last, q, kv, layer_at, chunks, heads, out):
    """out [rows, heads, head_dim] = softmax(scale * q k) v, each row over the positions it sees.

    first, last  items of `items_of`
    q            [kv_heads, rows, group, head_dim] storage type (see `rows.place`)
    kv           the arena, flat; layer_at: where this layer begins in a block
    """
    group, chunk = heads.heads // heads.kv_heads, 0
    longest = (np.int64(chunks.context_lens.max()) // LANES + 2) * LANES
    scores = np.empty(ROWS * longest, np.float32)
    shares = np.empty(ROWS * longest, kv.dtype)
    sums = np.empty(ROWS * (heads.head_dim + 1), np.float32)
    for item in range(first, last):
        while item >= chunks.cu_items[chunk + 1]:
            chunk += 1
        begin, end = np.int64(chunks.cu_chunks[chunk]), np.int64(chunks.cu_chunks[chunk + 1])
        parts = (end - begin + QUERIES - 1) // QUERIES
        head, part = divmod(item - chunks.cu_items[chunk], parts)
        row = begin + part * QUERIES
        done, count = 0, min(QUERIES, end - row) * group
        tiles = (count + ROWS - 1) // ROWS
        while tiles > 0:
            m = (count - done + tiles - 1) // tiles
            attend_rows(
                m, row, done, head, chunk, q, kv, layer_at, chunks, heads, scores, shares, sums, out
            )
            done, tiles = done + m, tiles - 1


@njit(**KERNEL)
def attend_rows(
    m, row, done, head, chunk, q, kv, layer_at, chunks, heads, scores, shares, sums, out
):
    """Query rows done … done + m - 1, counted over (token, head of the group) from token `row`.

    scores, shares  [m, tiles * 16]: float32, and in the storage type once they are exponentials
    sums            float32 [m * head_dim + m]: weighted values, then the sums of the exponentials
    """
    group, head_dim = heads.heads // heads.kv_heads, heads.head_dim
    start = np.int64(chunks.positions[row])
    low = max(start + done // group - heads.window + 1, 0) // LANES
    end = start + (done + m - 1) // group + 1
    stride = ((end + LANES - 1) // LANES - low) * LANES
    table = chunks.tables[chunk]
    head_at = layer_at + head * heads.block_size * head_dim
    query_at = ((head * len(chunks.positions) + row) * group + done) * head_dim
    values_at = head_at + heads.kv_heads * heads.block_size * head_dim
    score(m, q, query_at, kv, head_at, values_at, table, low * LANES, stride, heads, scores)
    for r in range(m):
        soften(scores, shares, r * stride, stride, low * LANES,
               start + (done + r) // group, heads, sums, m * head_dim + r)  # fmt: skip
    mix(m, shares, stride, kv, values_at, table, low * LANES, end, heads, sums)
    for r in range(m):
        token, member = divmod(done + r, group)
        at = ((row + token) * heads.heads + head * group + member) * head_dim
        whole = fill(np.float32(1) / sums[m * head_dim + r])
        for d in range(0, head_dim, LANES):
            store(out, at + d, load(sums, r * head_dim + d) * whole)


@njit(**KERNEL)
def tile_at(table, position, head_at, step, heads):
    """Where the 16 positions from `position` on begin: `step` elements a position in a block."""
    block, slot = divmod(position, heads.block_size)
    return np.int64(table[block]) * heads.block_stride + head_at + slot * step


@njit(**KERNEL)
def score(m, q, query_at, kv, head_at, values_at, table, low, stride, heads, scores):
    """scores [m, stride] = q k for the positions low … low + stride - 1."""
    pair, size, dim = pair_of(kv), heads.block_size, heads.head_dim
    for at in range(0, stride, LANES):
        keys, soon = tile_at(table, low + at, head_at, pair, heads), at + AHEAD
        if soon < stride:
            ahead = tile_at(table, low + soon, head_at, pair, heads) - keys
        else:
            first = low + min(soon - stride, stride - LANES)
            ahead = tile_at(table, first, values_at, dim, heads) - keys
        tile16(
            m, q, query_at, dim, kv, keys, size * pair, dim // pair, ahead,
            ZEROS, 0, 0, scores, at, stride,
        )  # fmt: skip


@njit(**KERNEL)
def soften(scores, shares, at, stride, low, position, heads, sums, sum_at):
    """shares = exp(scale * (scores - their maximum)) where the row may look, else 0; their sum."""
    oldest = max(position - heads.window + 1, 0)
    best = fill(NOTHING)
    for i in range(0, stride, LANES):
        lanes = inside(load(scores, at + i), low + i, oldest, position, NOTHING)
        store(scores, at + i, lanes)
        best = larger(best, lanes)
    scale = fill(heads.scale)
    top = fill(-largest(best) * heads.scale)
    whole = fill(np.float32(0))
    for i in range(0, stride, LANES):
        lanes = exp2(fma(load(scores, at + i), scale, top))
        store(shares, at + i, lanes)
        whole = whole + lanes
    sums[sum_at] = total(whole)


@njit(**KERNEL)
def mix(m, shares, stride, kv, values_at, table, low, end, heads, sums):
    """sums [m, head_dim] = shares v over the positions low … end - 1."""
    pair, head_dim = pair_of(kv), heads.head_dim
    sums[: m * head_dim] = 0
    for at in range(0, stride, LANES):
        values = tile_at(table, low + at, values_at, head_dim, heads)
        soon = low + min(at + AHEAD, stride - LANES)
        ahead = tile_at(table, soon, values_at, head_dim, heads) - values
        steps = (min(LANES, end - low - at) + pair - 1) // pair
        for r in range(0, m, WIDE_ROWS):
            mix_tile(
                min(WIDE_ROWS, m - r), shares, r * stride + at, stride, kv, values, steps, head_dim,
                pair, ahead, sums, r * head_dim,
            )  # fmt: skip


@njit(**KERNEL)
def mix_tile(m, shares, at, stride, kv, v_at, steps, head_dim, pair, ahead, sums, to):
    """sums += shares v for one tile of positions, 64 dimensions at a time."""
    d = 0
    while d + 64 <= head_dim:
        tile64(m, shares, at, stride, kv, v_at + d * pair, head_dim * pair, steps, ahead,
               sums, to + d, head_dim, sums, to + d, head_dim)  # fmt: skip
        d += 64
    if d + 32 <= head_dim:
        tile32(m, shares, at, stride, kv, v_at + d * pair, head_dim * pair, steps, ahead,
               sums, to + d, head_dim, sums, to + d, head_dim)  # fmt: skip
        d += 32
    if d < head_dim:
        tile16(m, shares, at, stride, kv, v_at + d * pair, head_dim * pair, steps, ahead,
               sums, to + d, head_dim, sums, to + d, head_dim)  # fmt: skip
