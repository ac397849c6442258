"""Operations on single rows against torch, and KV in the layout of `shapes.Heads`."""

import numpy as np
import pytest
import torch
from numba import njit

from mellmpi.engine.cpu.attention import items_of
from mellmpi.engine.cpu.packed_weights import pad_to, pair_of, storage, to_micro_panels
from mellmpi.engine.cpu.parallel_for import KERNEL
from mellmpi.engine.cpu.rows import embed, rms_norm, write_kv
from mellmpi.engine.cpu.shapes import Chunks, Heads

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@njit(**KERNEL)
def run_embed(tokens, matrix, is_packed, size, hidden, x):
    embed(0, len(tokens), tokens, matrix, 0, is_packed, size, hidden, x)


@njit(**KERNEL)
def run_rms_norm(rows, x, size, hidden, weight, eps, out, stride):
    rms_norm(0, len(rows), rows, x, size, hidden, weight, 0, eps, out, stride)


@njit(**KERNEL)
def run_write_kv(first, last, qkv, stride, rope, norms, chunks, heads, q, kv, layer_at):
    write_kv(first, last, qkv, stride, rope, norms, 0, chunks, heads, q, kv, layer_at)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_token_becomes_its_row_of_the_embedding(dtype, is_packed):
    matrix, tokens = random(90, 40, dtype=dtype), np.array([0, 31, 32, 89, 5], np.int32)
    flat = to_micro_panels(pad_to(matrix, 96, 64)).contiguous() if is_packed else matrix
    x = np.full((5, 64), 9, np.float32)
    run_embed(tokens, storage(flat).ravel(), is_packed, 40, 64, x.ravel())
    assert np.array_equal(x[:, :40], matrix[tokens].float().numpy())
    assert (x[:, 40:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_ignores_padding(dtype):
    x, weight = pad_to(random(6, 40), 6, 64), pad_to(random(40, seed=1), 64)
    rows, out = np.array([4, 1], np.int64), torch.zeros(2, 96, dtype=dtype)
    run_rms_norm(
        rows, x.numpy().ravel(), 40, 64, weight.numpy(), np.float32(1e-5), storage(out).ravel(), 96
    )
    expected = torch.nn.functional.rms_norm(x[rows][:, :40], (40,), weight[:40], 1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out[:, :40].float(), expected, atol=tolerance, rtol=tolerance)
    assert not out[:, 40:].any()


class Writing:
    """Two chunks whose KV is written into an arena; one chunk begins at an odd position."""

    heads, kv_heads, size = 4, 2, 16
    spans = ((3, 12), (16, 21))  # positions of each chunk
    tables = np.array([[2, 0], [4, 1]], np.int32)

    def __init__(self, dtype, head_dim=48, qk_norm=True):
        self.dtype, self.dim, self.qk_norm = dtype, head_dim, qk_norm
        lengths = [end - start for start, end in self.spans]
        self.positions = np.concatenate([np.arange(*span) for span in self.spans])
        cu_chunks = np.cumsum([0, *lengths]).astype(np.int32)
        self.rows = int(cu_chunks[-1])
        self.qkv = random(self.rows, self.heads + 2 * self.kv_heads, head_dim)
        self.norms, self.angles = random(2, head_dim, seed=1), random(24, head_dim // 2, seed=2)
        half = -(-head_dim // 32) * 16
        self.rope = torch.stack(
            [pad_to(f(self.angles), 24, half) for f in (torch.cos, torch.sin)], 1
        )
        self.chunks = Chunks(
            positions=self.positions.astype(np.int32),
            row_chunks=np.repeat([0, 1], lengths),
            cu_chunks=cu_chunks,
            context_lens=np.array([end for _, end in self.spans], np.int32),
            tables=self.tables,
            cu_items=items_of(cu_chunks, self.kv_heads),
        )
        self.arena = torch.full((5, 2, 2, self.kv_heads, self.size * head_dim), 7.0).to(dtype)
        self.q = torch.zeros(self.kv_heads, self.rows, 2, head_dim, dtype=dtype)

    def run(self, *ranges):
        layer = self.arena[0, 0].numel()
        sizes = Heads(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim,
            block_size=self.size,
            block_stride=2 * layer,
            window=99,
            scale=np.float32(1),
            qk_norm=self.qk_norm,
            eps=np.float32(1e-5),
        )
        for first, last in ranges:
            run_write_kv(
                first,
                last,
                self.qkv.numpy().ravel(),
                self.qkv[0].numel(),
                self.rope.numpy().ravel(),
                self.norms.numpy().ravel(),
                self.chunks,
                sizes,
                storage(self.q).ravel(),
                storage(self.arena).ravel(),
                layer,
            )
        return self

    def rotated(self, x, norm):
        """x [rows, heads, head_dim], normed and rotated as in transformers."""
        if self.qk_norm:
            x = torch.nn.functional.rms_norm(x, (self.dim,), norm, 1e-5)
        angles = self.angles[self.positions][:, None]
        cos, sin = (torch.cat((f(angles), f(angles)), -1) for f in (torch.cos, torch.sin))
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    def found(self):
        """(keys, values) [rows, kv_heads, head_dim] of layer 1, read at their slots."""
        pair, keys, values = pair_of(self.dtype), [], []
        for chunk, position in zip(self.chunks.row_chunks, self.positions, strict=True):
            block, slot = self.tables[chunk][position // self.size], position % self.size
            k = self.arena[block, 1, 0].view(self.kv_heads, self.dim // pair, self.size, pair)
            v = self.arena[block, 1, 1].view(self.kv_heads, self.size // pair, self.dim, pair)
            keys.append(k[:, :, slot].flatten(1))
            values.append(v[:, slot // pair, :, slot % pair])
        return torch.stack(keys), torch.stack(values)


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


@pytest.mark.parametrize(("head_dim", "qk_norm"), [(48, True), (64, False), (16, True)])
def test_queries_keys_and_values_are_written_where_attention_reads_them(dtype, head_dim, qk_norm):
    writing = Writing(dtype, head_dim, qk_norm)
    writing.run((0, writing.rows))
    q, k, v = writing.qkv.split((4, 2, 2), dim=1)
    tolerance = (
        {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.01}
    )
    grouped = writing.q.permute(1, 0, 2, 3).flatten(1, 2).float()
    torch.testing.assert_close(grouped, writing.rotated(q, writing.norms[0]), **tolerance)
    keys, values = writing.found()
    torch.testing.assert_close(keys.float(), writing.rotated(k, writing.norms[1]), **tolerance)
    assert torch.equal(values, v.to(dtype))


def test_other_layers_blocks_and_slots_stay_as_they_are(dtype):
    writing = Writing(dtype)
    writing.run((0, writing.rows))
    assert (writing.arena[:, 0] == 7).all() and (writing.arena[3] == 7).all()
    values = writing.arena[2, 1, 1].view(2, 16 // pair_of(dtype), 48, pair_of(dtype))
    earlier = values.transpose(2, 3).flatten(1, 2)[:, :3]  # what an earlier step wrote
    assert (earlier == 7).all()


def test_rows_may_be_written_by_different_threads_in_any_order(dtype):
    """Two rows whose values share words: one row writes both values, the other none."""
    whole, pieces = Writing(dtype), Writing(dtype)
    whole.run((0, whole.rows))
    pieces.run(*((row, row + 1) for row in reversed(range(pieces.rows))))
    assert torch.equal(whole.arena, pieces.arena) and torch.equal(whole.q, pieces.q)
    if dtype == torch.bfloat16:
        lone = Writing(dtype).run((2, 3))  # position 5, beside 4
        assert (lone.arena[:, :, 1] == 7).all()
        both = Writing(dtype).run((1, 2))  # position 4
        assert torch.equal(both.found()[1][1:3], whole.found()[1][1:3])
