import numpy as np
import pytest

from mellmpi.engine import pack
from mellmpi.protocol import Chunk, StepPlan

BLOCK_SIZE = 4


@pytest.fixture
def plan(greedy):
    """A decode at position 9, a sampled prompt end, and the first part of another prompt."""

    def chunk(start, tokens, table, sampling):
        return Chunk(0, start, tokens, table, sampling, ((), []))

    return StepPlan(
        "m",
        (
            chunk(9, (70,), [5, 0, 7, 6], greedy),
            chunk(3, (40, 41), [1, 3], greedy),
            chunk(0, (10, 11, 12), [2], None),
        ),
        (),
    )


def test_rows_are_the_chunks_in_plan_order(plan):
    batch = pack(plan, BLOCK_SIZE)
    assert batch.tokens.tolist() == [70, 40, 41, 10, 11, 12]
    assert batch.positions.tolist() == [9, 3, 4, 0, 1, 2]
    assert batch.cu_chunks.tolist() == [0, 1, 3, 6]
    assert batch.num_tokens == 6 and batch.num_chunks == 3


def test_a_chunk_attends_to_all_positions_up_to_its_last(plan):
    assert pack(plan, BLOCK_SIZE).context_lens.tolist() == [10, 5, 3]


def test_block_tables_hold_the_blocks_of_the_step_padded_with_zero(plan):
    assert pack(plan, BLOCK_SIZE).block_tables.tolist() == [[5, 0, 7], [1, 3, 0], [2, 0, 0]]


def test_logits_are_of_the_last_row_of_each_sampled_chunk(plan):
    batch = pack(plan, BLOCK_SIZE)
    assert batch.num_sampled == 2 and batch.last_rows.tolist() == [0, 2]


def test_every_array_is_int32_and_contiguous(plan):
    batch = pack(plan, BLOCK_SIZE)
    for name in ("tokens", "positions", "cu_chunks", "context_lens", "block_tables"):
        array = getattr(batch, name)
        assert array.dtype == np.int32 and array.flags.c_contiguous, name


def test_a_table_too_short_for_its_positions_is_a_bug(plan, greedy):
    short = Chunk(3, 7, (1, 2), [4, 5], greedy, ((), []))
    with pytest.raises(AssertionError, match="2 blocks for positions up to 9, which need 3"):
        pack(StepPlan("m", (short,), ()), BLOCK_SIZE)


def test_an_empty_chunk_is_a_bug(greedy):
    with pytest.raises(AssertionError, match="empty chunk"):
        pack(StepPlan("m", (Chunk(3, 7, (), [4, 5], greedy, ((), [])),), ()), BLOCK_SIZE)


def test_a_sampled_chunk_after_one_that_is_not_is_a_bug(plan):
    with pytest.raises(AssertionError, match="first"):
        pack(StepPlan("m", plan.chunks[::-1], ()), BLOCK_SIZE)
