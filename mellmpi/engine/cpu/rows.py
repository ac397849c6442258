"""Operations on single rows: embedding, RMSNorm, rotary embedding, the write into the KV arena.

Functions that take `first, last` compute rows first … last - 1 (see `parallel_for`).
"""

import numpy as np
from numba import njit

from mellmpi.engine.cpu.memory import (
    element,
    load,
    pair_of,
    store,
    store_odd,
    store_pairs,
    store_words,
)
from mellmpi.engine.cpu.packed_weights import NR
from mellmpi.engine.cpu.parallel_for import KERNEL
from mellmpi.engine.cpu.vectors import LANES, fill, fma, total


@njit(**KERNEL)
def embed(first, last, tokens, matrix, begin, is_packed, size, hidden, x):
    """x [rows, hidden] float32 = the tokens' rows of the embedding; zeros beyond `size`.

    is_packed  the matrix is the packed output projection (tied), else [vocabulary, size]
    """
    pair = pair_of(matrix)
    for row in range(first, last):
        token = np.int64(tokens[row])
        at, step = begin + token * size, pair
        if is_packed:
            at = begin + token // NR * NR * hidden + token % NR * pair
            step = NR * pair
        for d in range(size):
            x[row * hidden + d] = element(matrix, at + d // pair * step + d % pair)
        x[row * hidden + size : (row + 1) * hidden] = 0


@njit(**KERNEL)
def rms_norm(first, last, rows, x, size, hidden, weight, weight_at, eps, out, stride):
    """out [., stride] activation type = RMSNorm of x[rows] over the first `size` of its elements.

    The others, up to `hidden`, are 0.
    """
    for i in range(first, last):
        source, target = np.int64(rows[i]) * hidden, i * stride
        scale = fill(inverse_rms(x, source, hidden, size, eps))
        for d in range(0, hidden, LANES):
            scaled = load(x, source + d) * scale
            store(out, target + d, scaled * load(weight, weight_at + d))


@njit(**KERNEL)
def inverse_rms(x, at, padded, size, eps):
    squares = fill(np.float32(0))
    for d in range(0, padded, LANES):
        lanes = load(x, at + d)
        squares = fma(lanes, lanes, squares)
    return np.float32(1) / np.sqrt(total(squares) / np.float32(size) + eps)


@njit(**KERNEL)
def write_kv(first, last, qkv, qkv_stride, rope, norms, norms_at, chunks, heads, q, kv, layer_at):
    """Norm and rotate queries and keys; write queries to q, keys and values into their blocks.

    qkv       [rows, qkv_stride] float32: query heads, key heads, value heads
    rope      [positions, 2, half] float32: cosines, sines; half is head_dim / 2 padded to 16
    norms     float32: from norms_at on those of queries, then those of keys, head_dim each
    q         [kv_heads, rows, heads / kv_heads, head_dim] activation type: query heads that share
              keys are adjacent
    kv        the arena, flat; layer_at: the offset of this layer in a block
    """
    group, rows, head_dim = heads.heads // heads.kv_heads, len(chunks.positions), heads.head_dim
    rotated = np.zeros(2 * (head_dim + 2 * LANES), np.float32)
    for row in range(first, last):
        position, chunk, source = np.int64(chunks.positions[row]), chunks.row_chunks[row], 0
        block, slot = divmod(position, heads.block_size)
        block_at = np.int64(chunks.tables[chunk, block]) * heads.block_stride + layer_at
        begins = row == chunks.cu_chunks[chunk]
        follows = row + 1 < chunks.cu_chunks[chunk + 1]
        for head in range(heads.heads):
            source = row * qkv_stride + head * head_dim
            apply_rope(qkv, source, rope, position, norms, norms_at, heads, rotated)
            target = ((head // group * rows + row) * group + head % group) * head_dim
            for d in range(0, head_dim, LANES):
                store(q, target + d, load(rotated, d))
        for head in range(heads.kv_heads):
            source += head_dim
            apply_rope(qkv, source, rope, position, norms, norms_at + head_dim, heads, rotated)
            at = block_at + head * heads.block_size * head_dim
            write_key(rotated, kv, at, slot, heads.block_size, head_dim)
            at += heads.kv_heads * heads.block_size * head_dim
            value = source + heads.kv_heads * head_dim
            write_value(qkv, value, qkv_stride, kv, at, slot, head_dim, begins, follows)


@njit(**KERNEL)
def apply_rope(x, at, rope, position, norms, norms_at, heads, rotated):
    """rotated[: head_dim] = the head at x[at], normed if `qk_norm`, rotated to its position.

    rotated  float32 [2 * (head_dim + 32)]: the result, the head before rotation, and room for the
             last vector of each half where half a head is not a multiple of 16
    """
    head_dim = heads.head_dim
    scale, before = fill(np.float32(1)), head_dim + 2 * LANES
    if heads.qk_norm:
        scale = fill(inverse_rms(x, at, head_dim, head_dim, heads.eps))
    for d in range(0, head_dim, LANES):
        lanes = load(x, at + d)
        if heads.qk_norm:
            lanes = lanes * scale * load(norms, norms_at + d)
        store(rotated, before + d, lanes)
    half = head_dim // 2
    padded = (half + LANES - 1) // LANES * LANES
    cosines, sines = position * 2 * padded, position * 2 * padded + padded
    for d in range(0, half, LANES):
        low, high = load(rotated, before + d), load(rotated, before + half + d)
        store(rotated, d, low * load(rope, cosines + d) - high * load(rope, sines + d))
    for d in range(0, half, LANES):
        low, high = load(rotated, before + d), load(rotated, before + half + d)
        store(rotated, half + d, high * load(rope, cosines + d) + low * load(rope, sines + d))


@njit(**KERNEL)
def write_key(key, kv, at, slot, block_size, head_dim):
    """kv[at :] is [head_dim / pair][block_size][pair]: a vector of positions for each step of k."""
    pair = pair_of(kv)
    for d in range(0, head_dim, LANES):
        store_words(kv, at + d * block_size + slot * pair, block_size * pair, load(key, d))


@njit(**KERNEL)
def write_value(x, x_at, x_stride, kv, at, slot, head_dim, begins, follows):
    """kv[at :] is [block_size / pair][head_dim][pair]: a vector of dimensions for each position.

    In bfloat16 an even position and the next odd one share words. The row of the even position
    writes both, so that no two threads write one word: the odd half from the next row, or zeros
    where no row `follows` in the chunk, because attention multiplies an unused slot by 0 and its
    content must be finite. An odd position writes its half only if it `begins` a chunk: an earlier
    step has written the even half.
    """
    pair = pair_of(kv)
    at += slot // pair * head_dim * pair
    for d in range(0, head_dim, LANES):
        value = load(x, x_at + d)
        if pair == 1:
            store(kv, at + d, value)
        elif slot % 2 == 0:
            odd = fill(np.float32(0))
            if follows:
                odd = load(x, x_at + x_stride + d)
            store_pairs(kv, at + d * pair, value, odd)
        elif begins:
            store_odd(kv, at + d * pair, value)
