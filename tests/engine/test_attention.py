import pytest
import torch

from mellmpi.engine import pack
from mellmpi.engine.cuda import attention
from mellmpi.engine.cuda.attention import (
    batched_attention,
    group_chunks,
    make_group,
    paged_attention,
)
from mellmpi.protocol import Chunk, StepPlan

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 6, 2, 8, 4, 128


def naive(q, k, v, start, window):
    """Softmax attention of one sequence in float64, position by position. q [n, heads, head_dim]"""
    out = torch.empty_like(q, dtype=torch.float64)
    for i, head in ((i, h) for i in range(len(q)) for h in range(q.shape[1])):
        last = start + i
        first = max(0, last + 1 - window) if window else 0
        kv_head = head // (q.shape[1] // k.shape[1])
        keys, values = (x[first : last + 1, kv_head].double() for x in (k, v))
        scores = keys @ q[i, head].double() / q.shape[2] ** 0.5
        out[i, head] = torch.softmax(scores, 0) @ values
    return out.float()


@pytest.fixture
def cache():
    torch.manual_seed(0)
    return torch.randn(NUM_BLOCKS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)


@pytest.fixture
def plan(greedy):
    """Shuffled tables; (start, tokens) of decodes with short and long contexts, and of chunks."""
    ids = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    shapes = [(0, 1), (37, 1), (3, 1), (90, 1), (0, 7), (21, 5), (30, 5), (2, 9), (36, 1)]
    chunks = []
    for start, n in shapes:
        table = [ids.pop() for _ in range(-(-(start + n) // BLOCK_SIZE))]
        chunks.append(Chunk(0, start, tuple(range(n)), table, greedy, ((), [])))
    return StepPlan("m", tuple(chunks), ())


def contents(cache, chunk):
    """K and V [context, kv_heads, head_dim] of one chunk's sequence."""
    end = chunk.start + len(chunk.tokens)
    return (cache[chunk.block_table, kv].transpose(1, 2).flatten(0, 1)[:end] for kv in (0, 1))


def attend(batch, q, cache, window, dtype=torch.float32):
    positions = torch.from_numpy(batch.positions)
    groups = [
        make_group(*map(torch.from_numpy, group), positions, BLOCK_SIZE, window, dtype)
        for group in group_chunks(batch, BLOCK_SIZE)
    ]
    return batched_attention(q, cache, groups)


@pytest.mark.parametrize("window", [None, 6])
def test_the_reference_is_softmax_attention_over_the_visible_positions(window, cache, plan):
    for chunk in plan.chunks:
        n, q = len(chunk.tokens), torch.randn(len(chunk.tokens), HEADS, HEAD_DIM)
        got = paged_attention(
            q, cache[:, 0], cache[:, 1], torch.tensor(chunk.block_table), chunk.start + n, window
        )
        torch.testing.assert_close(got, naive(q, *contents(cache, chunk), chunk.start, window))


@pytest.mark.parametrize("window", [None, 6])
def test_a_ragged_batch_equals_the_reference_of_each_sequence(window, cache, plan):
    batch = pack(plan, BLOCK_SIZE)
    q = torch.randn(batch.num_tokens, HEADS, HEAD_DIM)
    got = attend(batch, q, cache, window)
    for chunk, start, end in zip(plan.chunks, batch.cu_chunks, batch.cu_chunks[1:], strict=False):
        table, context = torch.tensor(chunk.block_table), chunk.start + len(chunk.tokens)
        alone = paged_attention(q[start:end], cache[:, 0], cache[:, 1], table, context, window)
        torch.testing.assert_close(got[start:end], alone)


def test_the_order_of_blocks_in_memory_does_not_matter(cache, plan):
    shuffle = torch.randperm(NUM_BLOCKS)
    inverse = torch.argsort(shuffle)
    chunk = plan.chunks[3]
    table, q = torch.tensor(chunk.block_table), torch.randn(1, HEADS, HEAD_DIM)
    shuffled = cache[shuffle]
    torch.testing.assert_close(
        paged_attention(q, cache[:, 0], cache[:, 1], table, 91),
        paged_attention(q, shuffled[:, 0], shuffled[:, 1], inverse[table], 91),
    )


def test_slots_after_a_context_change_nothing(cache, plan):
    batch = pack(plan, BLOCK_SIZE)
    q = torch.randn(batch.num_tokens, HEADS, HEAD_DIM)
    before = attend(batch, q, cache, None)
    for chunk in plan.chunks:
        end = chunk.start + len(chunk.tokens)
        if end % BLOCK_SIZE:
            cache[chunk.block_table[-1], :, :, end % BLOCK_SIZE :] = 1e4
    torch.testing.assert_close(attend(batch, q, cache, None), before, rtol=0, atol=0)


def test_every_row_is_in_one_group_and_padding_is_bounded(plan):
    batch = pack(plan, BLOCK_SIZE)
    groups = group_chunks(batch, BLOCK_SIZE)
    rows = sorted(row for rows, _ in groups for row in rows.ravel().tolist())
    assert rows == list(range(batch.num_tokens))
    for rows, tables in groups:
        ends = batch.positions[rows[:, -1]] + 1
        assert tables.shape[1] * BLOCK_SIZE < 4 * ends.min() + BLOCK_SIZE * 4


def test_long_chunks_over_long_contexts_have_groups_of_their_own(cache, plan, monkeypatch):
    batch = pack(plan, BLOCK_SIZE)
    q = torch.randn(batch.num_tokens, HEADS, HEAD_DIM)
    together, num_groups = attend(batch, q, cache, None), len(group_chunks(batch, BLOCK_SIZE))
    monkeypatch.setattr(attention, "LARGE_MASK", 8)
    assert len(group_chunks(batch, BLOCK_SIZE)) > num_groups
    torch.testing.assert_close(attend(batch, q, cache, None), together)


def test_decoding_sequences_of_similar_contexts_share_a_group(greedy):
    chunks = tuple(
        Chunk(0, start, (1,), list(range(20)), greedy, ((), [])) for start in (40, 33, 59, 47)
    )
    groups = group_chunks(pack(StepPlan("m", chunks, ()), BLOCK_SIZE), BLOCK_SIZE)
    assert len(groups) == 1
