"""Attention over the paged arena: a few rows of queries that share keys, against all they may see.

Positions are taken in tiles of 16 that begin at multiples of 16, whatever the chunk: scores of a
tile are one vector a row, the maximum is exact, and the sums run over tiles in order. Tiles that a
row does not see add exact zeros. So a row's result does not depend on the rows beside it.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from mellmpi.engine.cpu.features import MOST_ROWS
from mellmpi.engine.cpu.gemm import tile16, tile32, tile64
from mellmpi.engine.cpu.memory import load, pair_of, store
from mellmpi.engine.cpu.parallel_for import KERNEL
from mellmpi.engine.cpu.vectors import LANES, exp2, fill, fma, inside, larger, largest, total

QUERIES = 16  # tokens of a chunk that make one item
AHEAD = 4  # tiles that are prefetched, keys and then values: blocks lie scattered
ROWS, WIDE_ROWS = MOST_ROWS[1], MOST_ROWS[4]
NOTHING = np.float32(-np.inf)
ZEROS = np.zeros(4 * LANES, np.float32)


class Memory(NamedTuple):
    """What one thread needs for one tile of query rows."""

    scores: np.ndarray  # float32 [rows, stride]
    shares: np.ndarray  # as queries are stored [rows, stride]: their exponentials
    sums: np.ndarray  # float32 [rows, head_dim]: weighted values
    wholes: np.ndarray  # float32 [rows]: sums of the exponentials
    places: np.ndarray  # int64 [2 tiles + AHEAD]: where keys, then values of each tile begin


def items_of(cu_chunks: np.ndarray, kv_heads: int) -> np.ndarray:
    """int64 [chunks + 1]: running count of items, which are 16 tokens of a chunk and a KV head."""
    items = -(-np.diff(cu_chunks).astype(np.int64) // QUERIES) * kv_heads
    return np.concatenate([[0], np.cumsum(items)])


@njit(**KERNEL)
def memory_for(num_positions, head_dim, q):
    tiles = num_positions // LANES + 2
    return Memory(
        np.empty(ROWS * tiles * LANES, np.float32),
        np.empty(ROWS * tiles * LANES, q.dtype),
        np.empty(ROWS * head_dim, np.float32),
        np.empty(ROWS, np.float32),
        np.empty(2 * tiles + AHEAD, np.int64),
    )


@njit(**KERNEL)
def attend(first, last, q, kv, layer_at, chunks, heads, out, out_stride):
    """out [rows, heads, head_dim] = softmax(scale * q k) v, each row over the positions it sees.

    first, last  items of `items_of`
    q            [kv_heads, rows, group, head_dim] storage type (see `rows.place`)
    kv           the arena, flat; layer_at: where this layer begins in a block
    out_stride   elements from row to row of out
    """
    group, chunk = heads.heads // heads.kv_heads, 0
    memory = memory_for(np.int64(chunks.context_lens.max()), heads.head_dim, q)
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
                m,
                row,
                done,
                head,
                q,
                kv,
                layer_at,
                chunks,
                chunks.tables[chunk],
                heads,
                memory,
                out,
                out_stride,
            )
            done, tiles = done + m, tiles - 1


@njit(**KERNEL)
def attend_rows(m, row, done, head, q, kv, layer_at, chunks, table, heads, memory, out, out_stride):
    """Query rows done … done + m - 1, counted over (token, head of the group) from token `row`."""
    group, head_dim = heads.heads // heads.kv_heads, heads.head_dim
    start = np.int64(chunks.positions[row])
    low = max(start + done // group - heads.window + 1, 0) // LANES * LANES
    end = start + (done + m - 1) // group + 1
    tiles = (end - low + LANES - 1) // LANES
    stride = (tiles | 1) * LANES  # see `panels.spread`
    head_at = layer_at + head * heads.block_size * head_dim
    find(tiles, low, table, head_at, heads, pair_of(kv), memory.places)
    query_at = ((head * len(chunks.positions) + row) * group + done) * head_dim
    score(m, q, query_at, kv, tiles, stride, heads, memory)
    for r in range(m):
        soften(r, r * stride, tiles, low, start + (done + r) // group, heads, memory)
    mix(m, kv, tiles, stride, (end - 1) % LANES + 1, head_dim, memory)
    for r in range(m):
        token, member = divmod(done + r, group)
        at = (row + token) * out_stride + (head * group + member) * head_dim
        scale = fill(np.float32(1) / memory.wholes[r])
        for d in range(0, head_dim, LANES):
            store(out, at + d, load(memory.sums, r * head_dim + d) * scale)


@njit(**KERNEL)
def find(tiles, low, table, head_at, heads, pair, places):
    """places = where the keys of each tile of positions begin, then the values, then again."""
    values_at = head_at + heads.kv_heads * heads.block_size * heads.head_dim
    for tile in range(tiles):
        block, slot = divmod(low + tile * LANES, heads.block_size)
        at = np.int64(table[block]) * heads.block_stride
        places[tile] = at + head_at + slot * pair
        places[tiles + tile] = at + values_at + slot * heads.head_dim
    for tile in range(2 * tiles, 2 * tiles + AHEAD):
        places[tile] = places[2 * tiles - 1]


@njit(**KERNEL)
def score(m, q, query_at, kv, tiles, stride, heads, memory):
    """scores [m, stride] = q k for all tiles of positions."""
    pair, dim = pair_of(kv), heads.head_dim
    steps = dim // pair
    for tile in range(tiles):
        tile16(
            m,
            q,
            query_at,
            dim,
            kv,
            0,
            heads.block_size * pair,
            memory.places,
            tile,
            tile + AHEAD,
            1,
            steps,
            steps,
            ZEROS,
            0,
            0,
            memory.scores,
            tile * LANES,
            stride,
        )


@njit(**KERNEL)
def soften(r, at, tiles, low, position, heads, memory):
    """shares = exp(scale * (scores - their maximum)) where the row may look, else 0; their sum."""
    scores, shares = memory.scores, memory.shares
    oldest = max(position - heads.window + 1, 0)
    best = fill(NOTHING)
    for i in range(0, tiles * LANES, LANES):
        lanes = load(scores, at + i)
        if low + i < oldest or low + i + LANES > position + 1:
            lanes = inside(lanes, low + i, oldest, position, NOTHING)
            store(scores, at + i, lanes)
        best = larger(best, lanes)
    scale = fill(heads.scale)
    top = fill(-largest(best) * heads.scale)
    whole = fill(np.float32(0))
    for i in range(0, tiles * LANES, LANES):
        lanes = exp2(fma(load(scores, at + i), scale, top))
        store(shares, at + i, lanes)
        whole = whole + lanes
    memory.wholes[r] = total(whole)


@njit(**KERNEL)
def mix(m, kv, tiles, stride, in_last, head_dim, memory):
    """sums [m, head_dim] = shares v over all tiles of positions, `in_last` of them in the last."""
    pair, shares, sums, places = pair_of(kv), memory.shares, memory.sums, memory.places
    steps, last_steps = LANES // pair, (in_last + pair - 1) // pair
    for row in range(0, m, WIDE_ROWS):
        rows, d = min(WIDE_ROWS, m - row), 0
        at, to = row * stride, row * head_dim
        while d + 64 <= head_dim:
            tile64(
                rows,
                shares,
                at,
                stride,
                kv,
                d * pair,
                head_dim * pair,
                places,
                tiles,
                tiles + AHEAD,
                tiles,
                steps,
                last_steps,
                ZEROS,
                0,
                0,
                sums,
                to + d,
                head_dim,
            )
            d += 64
        if d + 32 <= head_dim:
            tile32(
                rows,
                shares,
                at,
                stride,
                kv,
                d * pair,
                head_dim * pair,
                places,
                tiles,
                tiles + AHEAD,
                tiles,
                steps,
                last_steps,
                ZEROS,
                0,
                0,
                sums,
                to + d,
                head_dim,
            )
            d += 32
        if d < head_dim:
            tile16(
                rows,
                shares,
                at,
                stride,
                kv,
                d * pair,
                head_dim * pair,
                places,
                tiles,
                tiles + AHEAD,
                tiles,
                steps,
                last_steps,
                ZEROS,
                0,
                0,
                sums,
                to + d,
                head_dim,
            )
