"""Executors without a model: each token is a hash of all the KV of its context.

The arena is real: a block that is freed too early, copied wrongly or never sent changes tokens.
"""

from collections.abc import Sequence
from zlib import crc32

import numpy as np

from mellmpi.protocol import (
    Chunk,
    ModelKv,
    PromptLogprob,
    Request,
    StepPlan,
    StepResult,
    TokenLogprob,
)

VOCABULARY = 50
_A, _B = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def _kv(model: str, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """KV of tokens at these positions. uint64 [n], uint64 [n] -> uint64 [n]."""
    x = (tokens + np.uint64(1)) * _A + (positions + np.uint64(1)) * _B + _salt(model)
    return x ^ (x >> np.uint64(29))


def _salt(model: str) -> np.uint64:
    return np.uint64(crc32(model.encode()))


def _next_token(kv: np.ndarray, seed: int) -> int:
    """uint64 [context] and the request's seed -> the next token."""
    weights = np.arange(1, 2 * len(kv), 2, dtype=np.uint64)
    mixed = int((kv * weights).sum()) ^ (seed * int(_B) & (1 << 64) - 1)
    return (mixed ^ (mixed >> 31)) % VOCABULARY


def expected_outputs(request: Request) -> list[int]:
    """Output tokens of the request in any correct run."""
    tokens, sampling = list(request.prompt), request.sampling
    for _ in range(sampling.max_tokens):
        known = np.array(tokens, np.uint64)
        positions = np.arange(len(known), dtype=np.uint64)
        tokens.append(_next_token(_kv(request.model, known, positions), sampling.seed))
        if tokens[-1] in sampling.stop_token_ids:
            break
    return tokens[len(request.prompt) :]


def logprob(token: int, position: int) -> TokenLogprob:
    """Logprobs that the executor reports for this token at this position of the sequence."""
    value = -(position + token / VOCABULARY)
    return value, (token,), (value,)


def prompt_logprobs(tokens: Sequence[int], start: int) -> tuple[PromptLogprob, ...]:
    """Logprobs that the executor reports for tokens of a prompt from position `start` on."""
    return tuple((logprob(token, start + i), 1) for i, token in enumerate(tokens))


class HashExecutor:
    """Executes step plans on an arena of uint64 [num_blocks, width].

    width  positions per block; None: those of the largest block. Workers that transfer blocks to
           each other need the same width.
    """

    def __init__(self, num_blocks: int, models: Sequence[ModelKv], width: int | None = None):
        self._sizes = {kv.model: kv.block_size for kv in models}
        self.arena = np.zeros((num_blocks, width or max(self._sizes.values())), np.uint64)

    def execute(self, plan: StepPlan) -> StepResult:
        """Return one token per sampled chunk, in plan order."""
        assert not plan.copies
        tokens = [self._chunk(plan.model, chunk) for chunk in plan.chunks]
        sampled = [(t, c) for t, c in zip(tokens, plan.chunks, strict=True) if c.sampling]
        return StepResult(
            tuple(t for t, _ in sampled),
            tuple(self._logprob(t, c) for t, c in sampled),
            tuple(prompt_logprobs(c.scoring.tokens, c.start + 1) for c in plan.chunks if c.scoring),
        )

    def _logprob(self, token: int, chunk: Chunk) -> TokenLogprob | None:
        if chunk.sampling is None or chunk.sampling.num_logprobs is None:
            return None
        return logprob(token, chunk.start + len(chunk.tokens))

    def _chunk(self, model: str, chunk: Chunk) -> int:
        end, size = chunk.start + len(chunk.tokens), self._sizes[model]
        positions = np.arange(chunk.start, end)
        table = np.array(chunk.block_table)
        self.arena[table[positions // size], positions % size] = _kv(
            model, np.array(chunk.tokens, np.uint64), positions.astype(np.uint64)
        )
        context = self.arena[table, :size].reshape(-1)[:end]
        return _next_token(context, chunk.sampling.seed if chunk.sampling else 0)


class SilentExecutor(HashExecutor):
    """Token 0 always, at no cost: for runs in which only sizes and times matter."""

    def execute(self, plan: StepPlan) -> StepResult:
        num_sampled = sum(chunk.sampling is not None for chunk in plan.chunks)
        return StepResult((0,) * num_sampled, (None,) * num_sampled)
