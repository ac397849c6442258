"""A step plan as flat integer arrays, the input of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mellmpi.protocol import Chunk, StepPlan


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The C chunks of one step, concatenated in plan order to T rows.

    tokens        int32 [T]               token of each row
    positions     int32 [T]               position of each row in its sequence
    cu_chunks     int32 [C + 1]           chunk c is rows cu_chunks[c] … cu_chunks[c + 1] - 1
    context_lens  int32 [C]               positions that the last row of chunk c attends to
    block_tables  int32 [C, max_blocks]   physical block of each logical block, padded with 0
    num_sampled   int                     chunks that need logits of their last row; they are first
    is_scored     bool                    logits of further rows will be asked for after the step
    """

    tokens: np.ndarray
    positions: np.ndarray
    cu_chunks: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    num_sampled: int
    is_scored: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_chunks(self) -> int:
        return len(self.context_lens)

    @property
    def last_rows(self) -> np.ndarray:
        """int32 [num_sampled]: the rows that need logits."""
        return self.cu_chunks[1 : self.num_sampled + 1] - 1


def pack(plan: StepPlan, block_size: int) -> PackedBatch:
    """The arrays of a plan that has at least one chunk."""
    lengths = np.array([len(chunk.tokens) for chunk in plan.chunks], np.int32)
    contexts = lengths + np.array([chunk.start for chunk in plan.chunks], np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    num_tokens = int(ends[-1])
    return PackedBatch(
        tokens=np.array([token for chunk in plan.chunks for token in chunk.tokens], np.int32),
        positions=np.arange(num_tokens, dtype=np.int32) + np.repeat(contexts - ends, lengths),
        cu_chunks=np.concatenate((np.zeros(1, np.int32), ends)),
        context_lens=contexts,
        block_tables=_tables(plan.chunks, -(-contexts // block_size)),
        num_sampled=_num_sampled(plan.chunks),
        is_scored=any(chunk.scoring is not None for chunk in plan.chunks),
    )


def _tables(chunks: Sequence[Chunk], num_blocks: np.ndarray) -> np.ndarray:
    """int32 [C, max_blocks]: the blocks that each chunk needs; a chunk's table may be longer."""
    tables = np.zeros((len(chunks), num_blocks.max()), np.int32)
    for row, (chunk, n) in enumerate(zip(chunks, num_blocks.tolist(), strict=True)):
        assert chunk.tokens, f"request {chunk.request_id}: an empty chunk"
        assert len(chunk.block_table) >= n, (
            f"request {chunk.request_id}: {len(chunk.block_table)} blocks for positions up to "
            f"{chunk.start + len(chunk.tokens)}, which need {n}"
        )
        tables[row, :n] = chunk.block_table[:n]
    return tables


def _num_sampled(chunks: Sequence[Chunk]) -> int:
    """The number of sampled chunks; they must come first in the plan."""
    sampled = [chunk.sampling is not None for chunk in chunks]
    assert sampled == sorted(sampled, reverse=True), "sampled chunks must come first in a plan"
    return sum(sampled)
