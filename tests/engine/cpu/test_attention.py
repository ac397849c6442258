"""Paged attention: equal to plain torch, the same bits for any chunks and any blocks."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from numba import njit

from mellmpi.engine.cpu.attention import attend, items_of
from mellmpi.engine.cpu.packed_weights import activations, pair_of, storage
from mellmpi.engine.cpu.parallel_for import KERNEL
from mellmpi.engine.cpu.shapes import Chunks, Heads
from tests.engine.cpu.stored import empty, values

LENGTH, BLOCKS = 150, 40


@njit(**KERNEL)
def run(q, kv, layer_at, chunks, heads, out):
    width = heads.heads * heads.head_dim
    attend(0, chunks.cu_items[-1], q, kv, layer_at, chunks, heads, out, width)


class Sequence:
    """Random queries, keys and values of one sequence, and its KV in an arena of two layers."""

    def __init__(self, dtype, *, heads=6, kv_heads=2, head_dim=48, block_size=32, window=1 << 40):
        generator = torch.Generator().manual_seed(1)
        self.dtype, self.shape = dtype, (heads, kv_heads, head_dim, block_size)
        self.window, self.scale = window, head_dim**-0.5
        self.q = torch.randn(LENGTH, heads, head_dim, generator=generator).to(dtype)
        k, v = torch.randn(2, LENGTH, kv_heads, head_dim, generator=generator).to(dtype)
        self.k, self.v = k, v

    def arena(self, table):
        """This sequence's blocks in layer 1, in the layout of `shapes.Heads`, amid garbage."""
        _, kv_heads, dim, size = self.shape
        pair = pair_of(self.dtype)
        arena = torch.full((BLOCKS, 2, 2, kv_heads, size * dim), 7e3).to(self.dtype)
        for position in range(LENGTH):
            block, slot = table[position // size], position % size
            keys = arena[block, 1, 0].view(kv_heads, dim // pair, size, pair)
            values = arena[block, 1, 1].view(kv_heads, size // pair, dim, pair)
            keys[:, :, slot] = self.k[position].view(kv_heads, dim // pair, pair)
            values[:, slot // pair, :, slot % pair] = self.v[position]
        return arena

    def attend(self, start, end, table):
        """Attention of rows start … end - 1 as one chunk: [rows, heads, head_dim]."""
        heads, kv_heads, dim, size = self.shape
        kv, rows = self.arena(table), end - start
        grouped = self.q[start:end].view(rows, kv_heads, heads // kv_heads, dim).transpose(0, 1)
        cu_chunks = np.array([0, rows], np.int32)
        chunks = Chunks(
            positions=np.arange(start, end, dtype=np.int32),
            row_chunks=np.zeros(rows, np.int64),
            cu_chunks=cu_chunks,
            context_lens=np.array([end], np.int32),
            tables=np.array([table], np.int32),
            cu_items=items_of(cu_chunks, kv_heads),
        )
        sizes = Heads(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            block_size=size,
            block_stride=kv[0].numel(),
            window=self.window,
            scale=np.float32(self.scale * 1.4426950408889634),
            qk_norm=False,
            eps=np.float32(0),
        )
        out = empty((rows, heads, dim), self.dtype)
        q = activations(grouped.contiguous()).ravel()
        layer = kv[0, 0].numel()
        run(q, storage(kv.contiguous()).ravel(), layer, chunks, sizes, out.ravel())
        return values(out, self.dtype)

    def expected(self):
        heads, kv_heads, _, _ = self.shape
        k, v = (x.repeat_interleave(heads // kv_heads, 1).double() for x in (self.k, self.v))
        scores = torch.einsum("qhd,khd->hqk", self.q.double(), k) * self.scale
        q, k = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        scores[:, (k > q) | (k <= q - self.window)] = -torch.inf
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


SHAPES = {
    "shared by three": {},
    "one head each": dict(heads=2, kv_heads=2, head_dim=64, block_size=16),
    "shared by seven": dict(heads=14, kv_heads=2, head_dim=16, block_size=16),
    "shared by sixteen, wide": dict(heads=16, kv_heads=1, head_dim=112),
    "window": dict(window=37),
    "window of one": dict(window=1),
}
TABLE = [3, 9, 1, 30, 22, 17, 8, 0, 39, 25]


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def test_float32_attention_equals_that_of_torch_in_double_precision(shape):
    sequence = Sequence(torch.float32, **shape)
    out = sequence.attend(0, LENGTH, TABLE).double()
    torch.testing.assert_close(out, sequence.expected(), atol=3e-6, rtol=1e-5)


def test_bfloat16_attention_differs_only_by_the_rounding_of_its_weights(shape):
    sequence = Sequence(torch.bfloat16, **shape)
    out = sequence.attend(0, LENGTH, TABLE).double()
    torch.testing.assert_close(out, sequence.expected(), atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_for_any_division_into_chunks(shape, dtype):
    sequence = Sequence(dtype, **shape)
    whole = sequence.attend(0, LENGTH, TABLE)
    edges = [0, 1, 2, 17, 18, 50, 99, 100, 148, 149, LENGTH]
    pieces = [sequence.attend(a, b, TABLE) for a, b in pairwise(edges)]
    assert torch.equal(whole, torch.cat(pieces))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_blocks_in_the_arena_does_not_matter(dtype):
    sequence = Sequence(dtype)
    assert torch.equal(sequence.attend(0, LENGTH, TABLE), sequence.attend(0, LENGTH, sorted(TABLE)))
