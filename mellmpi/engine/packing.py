"""A step plan as flat integer arrays: what a model reads of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from mellmpi.protocol import Chunk, StepPlan


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The chunks of one step, one after the other in plan order.

    ints          int32 [n]                   everything below, contiguous: one copy to a device
    tokens        int32 [T]                   T positions to compute
    positions     int32 [T]                   of each in its sequence
    cu_chunks     int32 [C + 1]               chunk c owns rows cu_chunks[c] … cu_chunks[c + 1]
    context_lens  int32 [C]                   positions seen by chunk c, its last token included
    block_tables  int32 [C, max_blocks]       physical block of every logical one, padded with 0
    num_sampled   int                         the first so many chunks want logits of their last row

    The arrays are views of `ints`, in this order.
    """

    ints: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    cu_chunks: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    num_sampled: int

    @property
    def num_chunks(self) -> int:
        return len(self.context_lens)

    @property
    def last_rows(self) -> np.ndarray:
        """int32 [num_sampled]: the rows whose logits are wanted."""
        return self.cu_chunks[1 : self.num_sampled + 1] - 1


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)  # ceiling division


def _check(chunk: Chunk, num_blocks: int) -> None:
    assert chunk.tokens, f"request {chunk.request_id}: an empty chunk"
    assert len(chunk.block_table) >= num_blocks, (
        f"request {chunk.request_id}: {len(chunk.block_table)} blocks for positions up to "
        f"{chunk.start + len(chunk.tokens)}, which need {num_blocks}"
    )


def views(ints: np.ndarray, num_tokens: int, num_chunks: int) -> tuple[np.ndarray, ...]:
    """(tokens, positions, cu_chunks, context_lens, block_tables) inside `ints`, not copied.

    Only slices and reshapes, so `ints` may as well be a tensor on a device.
    """
    ends = list(accumulate((num_tokens, num_tokens, num_chunks + 1, num_chunks)))
    tokens, positions, cu_chunks, context_lens = (
        ints[start:end] for start, end in zip([0, *ends], ends, strict=False)
    )
    return tokens, positions, cu_chunks, context_lens, ints[ends[-1] :].reshape(num_chunks, -1)


def pack(plan: StepPlan, block_size: int) -> PackedBatch:
    """The arrays of one step, which must have at least one chunk."""
    chunks = plan.chunks
    lengths = [len(chunk.tokens) for chunk in chunks]
    contexts = [chunk.start + n for chunk, n in zip(chunks, lengths, strict=True)]
    blocks = [blocks_for(context, block_size) for context in contexts]
    num_tokens = sum(lengths)
    size = 2 * num_tokens + 2 * len(chunks) + 1 + len(chunks) * max(blocks)
    ints = np.zeros(size, np.int32)
    tokens, positions, cu_chunks, context_lens, tables = views(ints, num_tokens, len(chunks))
    cu_chunks[1:] = np.cumsum(lengths)
    context_lens[:] = contexts
    for row, (chunk, num_blocks) in enumerate(zip(chunks, blocks, strict=True)):
        _check(chunk, num_blocks)
        tables[row, :num_blocks] = chunk.block_table[:num_blocks]
    tokens[:] = [token for chunk in chunks for token in chunk.tokens]
    positions[:] = np.arange(num_tokens) + np.repeat(context_lens - cu_chunks[1:], lengths)
    return PackedBatch(
        ints, tokens, positions, cu_chunks, context_lens, tables, _num_sampled(chunks)
    )


def _num_sampled(chunks: Sequence[Chunk]) -> int:
    """How many chunks are sampled; they stand first in the plan."""
    sampled = [chunk.sampling is not None for chunk in chunks]
    assert sampled == sorted(sampled, reverse=True), "sampled chunks must come first in a plan"
    return sum(sampled)
