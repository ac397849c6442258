"""Sampling: the next token of each sampled chunk from its logits, request and position.

A row's token does not depend on the other rows of the batch, bit for bit: otherwise a migration
could change the answer of a request. In this order: logprobs, penalties, restrictions (biases and
masks), temperature, truncation, noise.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from mellmpi.engine.grammar import Masks
from mellmpi.engine.random_sampling import (
    ONE,
    RowSampling,
    bound_of_kth_greatest,
    fixed_point_probabilities,
    sample_row,
    sample_rows,
    uniforms,
)
from mellmpi.engine.restrictions import restrict
from mellmpi.protocol import Chunk, PromptLogprob, Sampling, Scoring, StepResult, TokenLogprob

SCORED_ROWS = 64  # whose logits are computed together: 64 MB with a vocabulary of 256,000


def sample(logits: torch.Tensor, chunks: Sequence[Chunk], masks: Masks | None = None) -> StepResult:
    """The next token of each chunk, and its logprobs if the request asks for them.

    logits  float32 [chunks, vocab], contiguous; penalties and restrictions change them in place
    chunks  sampled chunks only; the new token's position follows that of the chunk's last
    masks   of the rows with a grammar
    """
    asked = [row for row, c in enumerate(chunks) if _sampling(c).num_logprobs is not None]
    raw = logits[asked].clone() if asked else logits
    penalise(logits, chunks)
    allowed = restrict(logits, chunks, masks or {})
    tokens = argmax(logits)
    _sample_randomly(tokens, logits, chunks, allowed)
    chosen = tuple(tokens.tolist())  # the only device → host copy, except for logprobs
    logprobs: list[TokenLogprob | None] = [None] * len(chunks)
    for row, values in zip(asked, raw.cpu().numpy() if asked else (), strict=True):
        logprobs[row] = token_logprob(values, chosen[row], _sampling(chunks[row]).num_logprobs or 0)
    return StepResult(chosen, tuple(logprobs))


def _sampling(chunk: Chunk) -> Sampling:
    assert chunk.sampling is not None, f"request {chunk.request_id}: not a sampled chunk"
    return chunk.sampling


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """int64 [n]: the likeliest token of each row, of equal ones the lowest id."""
    if logits.device.type == "cpu":  # numpy's is vectorised, torch's is not: 0.1 ms against 1.3
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _sample_randomly(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    chunks: Sequence[Chunk],
    allowed: Mapping[int, np.ndarray],
) -> None:
    """Replace the tokens int64 [chunks] of rows with random sampling.

    A temperature of 0 and a top-k of 1 both mean the likeliest token.

    allowed  row -> ids of all its finite logits: the others have no probability, and take no time
    """
    samplings = [_sampling(chunk) for chunk in chunks]
    rows = [row for row, s in enumerate(samplings) if s.temperature > 0 and s.top_k != 1]
    if not rows:
        return
    settings = row_samplings([chunks[row] for row in rows])
    if logits.device.type == "cpu":
        for row, setting in zip(rows, settings, strict=True):
            values, ids = logits[row].numpy(), allowed.get(row)
            tokens[row] = (
                sample_row(values, setting)
                if ids is None
                else ids[sample_row(values[ids], setting)]
            )
        return
    for truncates in (False, True):  # rows without truncation need no sorting
        group = [i for i, setting in enumerate(settings) if setting.truncates == truncates]
        if group:
            members = [rows[i] for i in group]
            tokens[members] = sample_rows(logits[members], [settings[i] for i in group])


def row_samplings(chunks: Sequence[Chunk]) -> list[RowSampling]:
    """The settings of each chunk's new token; its random number is of seed and position only."""
    samplings = [_sampling(chunk) for chunk in chunks]
    seeds = np.array([s.seed for s in samplings], np.uint64)
    positions = np.array([c.start + len(c.tokens) for c in chunks], np.uint64)
    numbers = uniforms(seeds, positions).tolist()
    return [
        RowSampling(u, s.temperature, s.min_p, s.top_k, s.top_p)
        for u, s in zip(numbers, samplings, strict=True)
    ]


# --- penalties -----------------------------------------------------------------------------------


def penalise(logits: torch.Tensor, chunks: Sequence[Chunk]) -> None:
    """Apply penalties in place: repetition over prompt and output, the others over the output.

    logits  float32 [chunks, vocab]
    """
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
    """Arrays [n] of a request's n different tokens: row, id, count in the output, strengths."""
    prompt, outputs = (np.array(tokens, np.int64) for tokens in chunk.history)
    produced, times = np.unique(outputs, return_counts=True)
    ids = np.union1d(prompt, produced)
    counts = np.zeros(len(ids), np.float32)
    counts[np.searchsorted(ids, produced)] = times
    s = _sampling(chunk)
    strengths = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty)
    columns = (np.full(len(ids), strength, np.float32) for strength in strengths)
    return np.full(len(ids), row), ids, counts, *columns


# --- logprobs ------------------------------------------------------------------------------------


def token_logprob(logits: np.ndarray, token: int, num_top: int) -> TokenLogprob:
    """Logprobs of `token` and of the `num_top` likeliest tokens. logits float32 [vocab].

    They are of the distribution before penalties, restrictions, temperature and truncation.
    """
    log_total = np.log(fixed_point_probabilities(logits, 1.0).sum() / ONE)

    def logprob(ids: int | np.ndarray) -> np.ndarray:
        values: np.ndarray = logits[ids].astype(np.float64) - logits.max() - log_total
        return values

    top = _greatest(logits, min(num_top, len(logits)))
    return float(logprob(token)), tuple(top.tolist()), tuple(logprob(top).tolist())


def score(
    logits_of: Callable[[np.ndarray], torch.Tensor], scoring: Scoring, row: int
) -> tuple[PromptLogprob, ...]:
    """Logprobs and ranks of tokens of one chunk, a slice of rows at a time.

    logits_of  int32 [n] rows of the batch -> float32 [n, vocab]
    row        of the chunk's first token in the batch
    """
    scored: list[PromptLogprob] = []
    for first in range(0, len(scoring.tokens), SCORED_ROWS):
        tokens = scoring.tokens[first : first + SCORED_ROWS]
        rows = np.arange(row + first, row + first + len(tokens), dtype=np.int32)
        for values, token in zip(logits_of(rows).cpu().numpy(), tokens, strict=True):
            row_logprobs = token_logprob(values, token, scoring.num_logprobs)
            scored.append((row_logprobs, rank(values, token)))
    return tuple(scored)


def rank(logits: np.ndarray, token: int) -> int:
    """The place of `token` among all tokens by logit, from 1; of equal ones the lower id first."""
    value = logits[token]
    before = np.count_nonzero(logits > value) + np.count_nonzero(logits[:token] == value)
    return 1 + int(before)


def _greatest(values: np.ndarray, n: int) -> np.ndarray:
    """int64 [n]: ids of the n greatest values, greatest first, of equal ones the lower id first."""
    if n == 0:
        return np.zeros(0, np.int64)
    ids = np.flatnonzero(values >= bound_of_kth_greatest(values, n))
    return ids[np.argsort(-values[ids], kind="stable")][:n]
