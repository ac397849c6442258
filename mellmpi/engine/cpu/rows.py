"""What happens to one row at a time: embedding, RMSNorm, rotary embedding, the write into the KV.

Functions that take `first, last` do rows first … last - 1 (see `team.shares`).
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
from mellmpi.engine.cpu.packed_weights import PANEL
from mellmpi.engine.cpu.parallel_for import KERNEL
from mellmpi.engine.cpu.vectors import LANES, fill, fma, total


@njit(**KERNEL)
def embed(first, last, tokens, matrix, begin, in_panels, size, hidden, x):
    """x [rows, hidden] float32 = the tokens' rows of the embedding; zeros beyond `size`.

    in_panels  the matrix is the packed output projection (tied), else [vocabulary, size]
    """
    pair = pair_of(matrix)
    for row in range(first, last):
        token = np.int64(tokens[row])
        at, step = begin + token * size, pair
        if in_panels:
            at = begin + token // PANEL * PANEL * hidden + token % PANEL * pair
            step = PANEL * pair
        for d in range(size):
            x[row * hidden + d] = element(matrix, at + d // pair * step + d % pair)
        x[row * hidden + size : (row + 1) * hidden] = 0


@njit(**KERNEL)
def normalise(first, last, rows, x, size, hidden, weight, weight_at, eps, out, stride):
    """out [., stride] storage type = RMSNorm of x[rows]; `size` elements count, the rest is 0."""
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
def place(first, last, qkv, qkv_stride, rotary, norms, norms_at, chunks, heads, q, kv, layer_at):
    """Norm and rotate queries and keys; queries to q, keys and values into their blocks.

    qkv       [rows, qkv_stride] float32: query heads, key heads, value heads
    rotary    [positions, 2, half] float32: cosines, sines; half is head_dim / 2 padded to 16
    norms     float32: at norms_at those of queries, then those of keys, head_dim each
    q         [kv_heads, rows, heads / kv_heads, head_dim] storage type: those that share keys
              lie together
    kv        the arena, flat; layer_at: where this layer begins in a block
    """
    group, rows, head_dim = heads.heads // heads.kv_heads, len(chunks.positions), heads.head_dim
    turned = np.zeros(2 * (head_dim + 2 * LANES), np.float32)
    for row in range(first, last):
        position, chunk, source = np.int64(chunks.positions[row]), chunks.row_chunks[row], 0
        block, slot = divmod(position, heads.block_size)
        block_at = np.int64(chunks.tables[chunk, block]) * heads.block_stride + layer_at
        begins = row == chunks.cu_chunks[chunk]
        follows = row + 1 < chunks.cu_chunks[chunk + 1]
        for head in range(heads.heads):
            source = row * qkv_stride + head * head_dim
            turn(qkv, source, rotary, position, norms, norms_at, heads, turned)
            target = ((head // group * rows + row) * group + head % group) * head_dim
            for d in range(0, head_dim, LANES):
                store(q, target + d, load(turned, d))
        for head in range(heads.kv_heads):
            source += head_dim
            turn(qkv, source, rotary, position, norms, norms_at + head_dim, heads, turned)
            at = block_at + head * heads.block_size * head_dim
            write_key(turned, kv, at, slot, heads.block_size, head_dim)
            at += heads.kv_heads * heads.block_size * head_dim
            value = source + heads.kv_heads * head_dim
            write_value(qkv, value, qkv_stride, kv, at, slot, head_dim, begins, follows)


@njit(**KERNEL)
def turn(x, at, rotary, position, norms, norms_at, heads, turned):
    """turned[: head_dim] = one head, normed if so asked, rotated to its position.

    turned  float32 [2 * (head_dim + 32)]: room for the head before it is rotated, and for the
            last vector of each half to spill over where half a head is not whole vectors
    """
    head_dim = heads.head_dim
    scale, before = fill(np.float32(1)), head_dim + 2 * LANES
    if heads.qk_norm:
        scale = fill(inverse_rms(x, at, head_dim, head_dim, heads.eps))
    for d in range(0, head_dim, LANES):
        lanes = load(x, at + d)
        if heads.qk_norm:
            lanes = lanes * scale * load(norms, norms_at + d)
        store(turned, before + d, lanes)
    half = head_dim // 2
    padded = (half + LANES - 1) // LANES * LANES
    cosines, sines = position * 2 * padded, position * 2 * padded + padded
    for d in range(0, half, LANES):
        low, high = load(turned, before + d), load(turned, before + half + d)
        store(turned, d, low * load(rotary, cosines + d) - high * load(rotary, sines + d))
    for d in range(0, half, LANES):
        low, high = load(turned, before + d), load(turned, before + half + d)
        store(turned, half + d, high * load(rotary, cosines + d) + low * load(rotary, sines + d))


@njit(**KERNEL)
def write_key(key, kv, at, slot, block_size, head_dim):
    """kv[at :] is [head_dim / pair][block_size][pair]: a vector of positions for each step of k."""
    pair = pair_of(kv)
    for d in range(0, head_dim, LANES):
        store_words(kv, at + d * block_size + slot * pair, block_size * pair, load(key, d))


@njit(**KERNEL)
def write_value(x, x_at, x_stride, kv, at, slot, head_dim, begins, follows):
    """kv[at :] is [block_size / pair][head_dim][pair]: a vector of dimensions for each position.

    In bfloat16 two positions share words. Whoever has the even one writes both, the odd one's
    from the next row, so that no two threads write a word; or zeros where no row `follows` in the
    chunk: what is in the slot is multiplied by 0, and must be finite. Only an odd one that
    `begins` a chunk goes in beside what an earlier step wrote.
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
