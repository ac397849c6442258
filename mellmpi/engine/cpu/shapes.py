"""What the kernels of one step are told, in named tuples, which numba passes as plain arguments."""

from typing import NamedTuple

import numpy as np


class Heads(NamedTuple):
    """The heads of a model and where their keys and values lie in the arena.

    A block is [layers, 2, kv_heads, block_size, head_dim] elements; inside one head's part of it
    keys are [head_dim / pair][block_size][pair] and values [block_size / pair][head_dim][pair],
    with pair = 2 in bfloat16 and 1 in float32: what `tile` multiplies.
    """

    heads: int  # of queries
    kv_heads: int
    head_dim: int  # a multiple of 16
    block_size: int  # positions, a multiple of 16
    block_stride: int  # elements
    window: int  # positions a row sees, itself included; more than there are: no window
    scale: np.float32  # of scores, times log2(e)
    qk_norm: bool
    eps: np.float32


class Chunks(NamedTuple):
    """The chunks of one step (see `engine.packing.PackedBatch`)."""

    positions: np.ndarray  # int32 [rows]
    row_chunks: np.ndarray  # int64 [rows]: the chunk of each row
    cu_chunks: np.ndarray  # int32 [chunks + 1]
    context_lens: np.ndarray  # int32 [chunks]
    tables: np.ndarray  # int32 [chunks, max_blocks]
    cu_items: np.ndarray  # int64 [chunks + 1]: items of attention before each chunk


class Sizes(NamedTuple):
    """Widths of a model, padded to whole panels but for `size`."""

    layers: int
    size: int  # of the residual stream, as the model has it
    hidden: int
    inner: int
    qkv: int
    vocabulary: int
    normed_stride: int  # elements from row to row of what matrices are multiplied with: `spread`
    attended_stride: int
    inner_stride: int
    tied: bool  # the output projection is the embedding
    wide_from: int  # rows from which `linear` widens weights, or takes narrow tiles


class Weights(NamedTuple):
    """All weights of a model, flat. Matrices of layer i from 4 i on: qkv, o, gate-up, down."""

    matrices: np.ndarray  # storage type, packed (see `panels`)
    begins: np.ndarray  # int64 [4 layers + 1]: where each matrix begins; the last is the output
    embedding: np.ndarray  # storage type: [vocabulary, size], or `matrices` itself where tied
    biases: np.ndarray  # float32
    bias_begins: np.ndarray  # int64 [4 layers + 1]
    norms: np.ndarray  # float32 [2 layers + 1, hidden]: before attention, before MLP …, at the end
    head_norms: np.ndarray  # float32 [2 layers, head_dim]: queries, keys; unused without qk_norm


class Scratch(NamedTuple):
    """Memory for one step of at most so many rows, flat."""

    residual: np.ndarray  # float32 [rows, hidden]
    normed: np.ndarray  # storage type [rows, normed_stride]
    qkv: np.ndarray  # float32 [rows, qkv]
    queries: np.ndarray  # storage type [kv_heads, rows, group, head_dim]
    attended: np.ndarray  # storage type [rows, attended_stride]
    inner: np.ndarray  # storage type [rows, inner_stride]
