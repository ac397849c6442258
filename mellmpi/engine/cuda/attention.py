"""Attention over paged KV in plain torch: a reference for one sequence, and batched attention."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mellmpi.engine.packing import PackedBatch

LARGE_MASK = 4096  # tokens of a chunk x blocks of its context


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_len: int,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of one sequence's newest positions over its paged KV: the reference.

    q            [n, heads, head_dim]                       queries of the last n positions
    k_cache      [blocks, kv_heads, block_size, head_dim]   v_cache has this shape, too
    block_table  [logical blocks] int64                     physical id of each
    context_len  positions that the last query attends to, itself included
    window       most positions that a query attends to, itself included; None: all before it
    returns      [n, heads, head_dim]
    """
    n, heads, _ = q.shape
    k, v = (c[block_table].transpose(1, 2).flatten(0, 1)[:context_len] for c in (k_cache, v_cache))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    queries, keys = torch.arange(context_len - n, context_len)[:, None], torch.arange(context_len)
    visible = (keys <= queries) & (keys > queries - (window or context_len))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # heads first
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Group:
    """`g` chunks of `n` tokens each and of similar contexts, computed as one padded batch.

    rows    int64 [g * n]                     their rows in the batch, chunk by chunk
    tables  int64 [g, 1, blocks]              physical blocks, padded with 0
    bias    [g, 1, n, blocks * block_size]    0 where a query attends to a position, else -inf
    """

    rows: torch.Tensor
    tables: torch.Tensor
    bias: torch.Tensor


def group_chunks(batch: PackedBatch, block_size: int) -> list[tuple[np.ndarray, ...]]:
    """(rows int32 [g, n], tables int32 [g, blocks]) of each group of chunks.

    Chunks of a group have equal numbers of tokens, and contexts within a factor of four, which
    bounds both the padding and the number of launches. Decoding sequences share groups.
    """
    lengths, blocks = np.diff(batch.cu_chunks), -(-batch.context_lens // block_size)
    members: dict[tuple[int, int, int], list[int]] = {}
    for chunk, (n, size) in enumerate(zip(lengths.tolist(), blocks.tolist(), strict=True)):
        # A group of several chunks copies its mask for each KV head: too much where it is large.
        alone = n > 1 and n * size > LARGE_MASK
        key = n, (size.bit_length() + 1) // 2, chunk + 1 if alone else 0
        members.setdefault(key, []).append(chunk)
    return [
        (
            batch.cu_chunks[chunks][:, None] + np.arange(n, dtype=np.int32),
            batch.block_tables[chunks, : blocks[chunks].max()],
        )
        for (n, _, _), chunks in members.items()
    ]


def make_group(
    rows: torch.Tensor,
    tables: torch.Tensor,
    positions: torch.Tensor,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> Group:
    """A group with its mask, used by all layers. rows int64 [g, n], tables int64 [g, blocks]."""
    queries = positions[rows][:, None, :, None]
    keys = torch.arange(tables.shape[1] * block_size, device=rows.device)
    visible = keys <= queries
    if window is not None:
        visible &= keys > queries - window
    bias = torch.zeros(visible.shape, dtype=dtype, device=rows.device)
    return Group(rows.flatten(), tables[:, None], bias.masked_fill_(~visible, -torch.inf))


def batched_attention(q: torch.Tensor, cache: torch.Tensor, groups: list[Group]) -> torch.Tensor:
    """Attention of all rows of a batch over paged KV, their own KV included.

    q        [T, heads, head_dim]
    cache    [num_blocks, 2, kv_heads, block_size, head_dim]    one layer of the arena
    groups   together they contain every row once
    returns  [T, heads, head_dim]
    """
    if len(groups) == 1 and groups[0].tables.shape[0] == 1:  # a single chunk: rows are in order
        return _group_attention(q, cache, groups[0])
    out = torch.empty_like(q)
    for group in groups:
        out[group.rows] = _group_attention(q[group.rows], cache, group)
    return out


def _group_attention(q: torch.Tensor, cache: torch.Tensor, group: Group) -> torch.Tensor:
    """Attention of one group's rows: q [g * n, heads, head_dim].

    Query heads that share a KV head become rows in decode, and heads of stride 0 in prefill. So K
    and V are not copied for each query head, and a long chunk needs one mask for all heads.
    """
    g, _, n, size = group.bias.shape
    kv_heads, head_dim = cache.shape[2], cache.shape[4]
    share = q.shape[1] // kv_heads
    heads = torch.arange(kv_heads, device=q.device)[:, None]
    k, v = (
        cache[group.tables, kv, heads].view(g * kv_heads, 1, size, head_dim) for kv in (0, 1)
    )  # [g, kv_heads, blocks, block_size, head_dim], seen as one run of positions
    q = q.view(g, n, kv_heads, share, head_dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(g * kv_heads, *((1, share) if n == 1 else (share, n)), head_dim)
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    bias = group.bias.expand(g, kv_heads, n, size).reshape(g * kv_heads, 1, n, size)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(-1, *q.shape[1:3], size))
    out = out.view(g, kv_heads, share, n, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(g * n, kv_heads * share, head_dim)
