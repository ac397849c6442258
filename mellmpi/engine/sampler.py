"""The next token of each sampled chunk: a function of its request, its position and its logits.

A row's token does not depend on the other rows of the batch, bit for bit, or a request that moves
to another worker could change its answer.
"""

from collections.abc import Sequence

import numpy as np
import torch

from mellmpi.engine.random_sampling import (
    MASS,
    Draw,
    bound_of_greatest,
    draw_row,
    draw_rows,
    row_masses,
    uniforms,
)
from mellmpi.protocol import Chunk, Sampling, StepResult, TokenLogprob


def sample(logits: torch.Tensor, chunks: Sequence[Chunk]) -> StepResult:
    """The next token of each chunk, and its logprobs where the request asked for them.

    logits  float32 [chunks, vocab], contiguous; changed in place where there are penalties
    chunks  sampled ones only; the new token's position is that after the chunk's last
    """
    asked = [row for row, c in enumerate(chunks) if _sampling(c).num_logprobs is not None]
    raw = logits[asked].clone() if asked else logits
    penalise(logits, chunks)
    tokens = argmax(logits)
    _draw(tokens, logits, chunks)
    chosen = tuple(tokens.tolist())  # the only device → host sync, but for logprobs
    logprobs: list[TokenLogprob | None] = [None] * len(chunks)
    for row, values in zip(asked, raw.cpu().numpy() if asked else (), strict=True):
        logprobs[row] = token_logprob(values, chosen[row], _sampling(chunks[row]).num_logprobs or 0)
    return StepResult(chosen, tuple(logprobs))


def _sampling(chunk: Chunk) -> Sampling:
    assert chunk.sampling is not None, f"request {chunk.request_id}: not a sampled chunk"
    return chunk.sampling


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """int64 [n]: the likeliest token of each row, of equals the lowest id."""
    if logits.device.type == "cpu":  # numpy's is vectorised, torch's is not: 0.1 ms against 1.3
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _draw(tokens: torch.Tensor, logits: torch.Tensor, chunks: Sequence[Chunk]) -> None:
    """Put a random token in the place of each row that wants one.

    A temperature of 0 and a top-k of 1 both mean the likeliest token.
    """
    samplings = [_sampling(chunk) for chunk in chunks]
    rows = [row for row, s in enumerate(samplings) if s.temperature > 0 and s.top_k != 1]
    if not rows:
        return
    hows = draws_of([chunks[row] for row in rows])
    if logits.device.type == "cpu":
        for row, how in zip(rows, hows, strict=True):
            tokens[row] = draw_row(logits[row].numpy(), how)
        return
    for cuts in (False, True):  # what needs no sorting does not wait for what does
        group = [i for i, how in enumerate(hows) if how.cuts == cuts]
        if group:
            members = [rows[i] for i in group]
            tokens[members] = draw_rows(logits[members], [hows[i] for i in group])


def draws_of(chunks: Sequence[Chunk]) -> list[Draw]:
    """How to draw each chunk's new token; its noise is of the request's seed and its position."""
    samplings = [_sampling(chunk) for chunk in chunks]
    seeds = np.array([s.seed for s in samplings], np.uint64)
    positions = np.array([c.start + len(c.tokens) for c in chunks], np.uint64)
    noise = uniforms(seeds, positions).tolist()
    return [
        Draw(u, s.temperature, s.min_p, s.top_k, s.top_p)
        for u, s in zip(noise, samplings, strict=True)
    ]


# --- penalties -----------------------------------------------------------------------------------


def penalise(logits: torch.Tensor, chunks: Sequence[Chunk]) -> None:
    """Repetition penalty over prompt and output, presence and frequency over output; in place."""
    parts = [_penalties(row, chunk) for row, chunk in enumerate(chunks) if _penalised(chunk)]
    if not parts:
        return
    rows, ids, counts, *strengths = (
        torch.from_numpy(np.concatenate(column)).to(logits.device)
        for column in zip(*parts, strict=True)
    )
    repetition, presence, frequency = strengths
    values = logits[rows, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts
    logits[rows, ids] = values - presence * (counts > 0)


def _penalised(chunk: Chunk) -> bool:
    s = _sampling(chunk)
    return s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0


def _penalties(row: int, chunk: Chunk) -> tuple[np.ndarray, ...]:
    """(row, token id, times it is in the output, three strengths) of every token seen, [seen]."""
    prompt, outputs = (np.array(tokens, np.int64) for tokens in chunk.history)
    produced, times = np.unique(outputs, return_counts=True)
    ids = np.union1d(prompt, produced)
    counts = np.zeros(len(ids), np.float32)
    counts[np.searchsorted(ids, produced)] = times
    s = _sampling(chunk)
    strengths = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
    spread = (np.full(len(ids), strength, np.float32) for strength in strengths)
    return np.full(len(ids), row), ids, counts, *spread


# --- logprobs ------------------------------------------------------------------------------------


def token_logprob(logits: np.ndarray, token: int, num_top: int) -> TokenLogprob:
    """Of the distribution before penalties, temperature and truncation. logits float32 [vocab]."""
    log_total = np.log(row_masses(logits, 1.0).sum() / MASS)

    def logprob(ids: int | np.ndarray) -> np.ndarray:
        return logits[ids].astype(np.float64) - logits.max() - log_total

    top = _greatest(logits, min(num_top, len(logits)))
    return float(logprob(token)), tuple(top.tolist()), tuple(logprob(top).tolist())


def _greatest(values: np.ndarray, n: int) -> np.ndarray:
    """Ids of the n greatest values, greatest first, of equals the lower id first."""
    if n == 0:
        return np.zeros(0, np.int64)
    ids = np.flatnonzero(values >= bound_of_greatest(values, n))
    return ids[np.argsort(-values[ids], kind="stable")][:n]
