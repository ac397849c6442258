"""Arguments of the kernels of one step, in named tuples, which numba passes as plain arguments.

"Activation type" is the dtype of `packed_weights.activation_dtype`, "storage type" that of
`packed_weights.storage`.
"""

from typing import NamedTuple

import numpy as np


class View(NamedTuple):
    """The place of a micro-kernel's operand within a flat array, in elements."""

    at: int  # its first element
    stride: int  # from row to row; of packed weights from step to step


class Parts(NamedTuple):
    """The parts into which a micro-kernel's k is divided.

    Part i of w begins `offsets[first + i]` elements after the start of w's view; meanwhile the
    micro-kernel prefetches from `offsets[prefetch + i]` elements after that start.
    """

    first: int  # index into offsets
    prefetch: int  # index into offsets
    num_parts: int  # at least 1
    steps: int  # of each part but the last: elements of k in float32, pairs of them in bfloat16
    last_steps: int  # at least 1


class Matrix(NamedTuple):
    """The place of one packed matrix among all weights."""

    at: int  # its first element
    bias_at: int  # the first element of its bias
    inputs: int  # k
    panels: int  # micro-panels of NR outputs
    widen_from: int  # rows from which `linear` widens its weights, or takes narrow micro-kernels


class Heads(NamedTuple):
    """The attention heads of a model, and the layout of their keys and values in the arena.

    A block is [layers, 2, kv_heads, block_size, head_dim] elements. Inside one head's part of it
    keys are [head_dim / pair][block_size][pair] and values [block_size / pair][head_dim][pair],
    with pair = 2 in bfloat16 and 1 in float32: micro-panels of `gemm`.
    """

    heads: int  # of queries
    kv_heads: int
    head_dim: int  # a multiple of 16
    block_size: int  # positions, a multiple of 16
    block_stride: int  # elements
    window: int  # positions that a row attends to, itself included; without a window very many
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
    """Widths of a model in elements, padded to multiples of NR except `size`."""

    layers: int
    size: int  # of the residual stream, as the model has it
    hidden: int
    inner: int
    qkv: int
    vocabulary: int
    normed_stride: int  # from row to row of activations: see `packed_weights.padded_stride`
    attended_stride: int
    inner_stride: int
    tied: bool  # the output projection is the embedding
    widen_from: int  # see `Matrix`


class Weights(NamedTuple):
    """All weights of a model, flat. Matrices of layer i from 4 i on: qkv, o, gate-up, down."""

    matrices: np.ndarray  # storage type, packed (see `packed_weights`)
    begins: np.ndarray  # int64 [4 layers + 1]: the start of each matrix; the last is the output
    embedding: np.ndarray  # storage type: [vocabulary, size], or `matrices` itself where tied
    biases: np.ndarray  # float32
    bias_begins: np.ndarray  # int64 [4 layers + 1]
    norms: np.ndarray  # float32 [2 layers + 1, hidden]: before attention, before MLP …, at the end
    head_norms: np.ndarray  # float32 [2 layers, head_dim]: queries, keys; unused without qk_norm


class Scratch(NamedTuple):
    """Memory for one step of at most `rows` rows, flat."""

    residual: np.ndarray  # float32 [rows, hidden]
    normed: np.ndarray  # activation type [rows, normed_stride]
    qkv: np.ndarray  # float32 [rows, qkv]
    queries: np.ndarray  # activation type [kv_heads, rows, group, head_dim]
    attended: np.ndarray  # activation type [rows, attended_stride]
    inner: np.ndarray  # activation type [rows, inner_stride]
