"""The next token of each sampled chunk: a function of its request, its position and its logits.

A row's token must not depend on the other rows of the batch, bit for bit, or a request that moves
to another worker could change its answer. So rows meet only elementwise operations that are
correctly rounded, and sums of whole numbers below 2**53, which come out alike in any order:
probabilities are counted in units of 2**-34 of the likeliest token's.
"""

from collections.abc import Sequence

import numpy as np
import torch

from mellmpi.protocol import Chunk, Sampling, StepResult, TokenLogprob

Rows = slice | list[int]

MASS = 2.0**34  # of the likeliest token; with up to 2**18 of them every sum stays below 2**53


def sample(logits: torch.Tensor, chunks: Sequence[Chunk]) -> StepResult:
    """The next token of each chunk, and its logprobs where the request asked for them.

    logits  float32 [chunks, vocab], contiguous; changed in place where there are penalties
    chunks  sampled ones only; the new token's position is that after the chunk's last
    """
    asked = [row for row, c in enumerate(chunks) if _sampling(c).num_logprobs is not None]
    raw = logits[asked].clone() if asked else logits
    penalise(logits, chunks)
    tokens = argmax(logits)
    for rows, settings in _draws(chunks, logits.device):
        tokens[rows] = draw(logits[rows], settings)
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


def _draws(chunks: Sequence[Chunk], device: torch.device) -> list[tuple[Rows, np.ndarray]]:
    """Rows that need a random number, and their settings, in groups to draw together.

    A temperature of 0 and a top-k of 1 both mean the likeliest token. On a CPU every row is a group
    of its own, which stays in cache; elsewhere rows without top-k and top-p do not pay for others.
    """
    samplings = [_sampling(chunk) for chunk in chunks]
    rows = [row for row, s in enumerate(samplings) if s.temperature > 0 and s.top_k != 1]
    if not rows:
        return []
    table = draw_settings([chunks[row] for row in rows])
    if device.type == "cpu":
        return [(slice(row, row + 1), table[i : i + 1]) for i, row in enumerate(rows)]
    cut = (table[:, 3] > 0) | (table[:, 4] < 1)
    members = [np.flatnonzero(mask) for mask in (~cut, cut) if mask.any()]
    return [([rows[i] for i in group], table[group]) for group in members]


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


# --- drawing -------------------------------------------------------------------------------------


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) a row. uint64 [n], uint64 [n] -> float64 [n]. (splitmix64 finalizer)"""
    return (_mix(_mix(seeds) + positions) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_settings(chunks: Sequence[Chunk]) -> np.ndarray:
    """float64 [n, 5]: uniform number, temperature, min-p, top-k, top-p of each new token."""
    samplings = [_sampling(chunk) for chunk in chunks]
    seeds = np.array([s.seed for s in samplings], np.uint64)
    positions = np.array([c.start + len(c.tokens) for c in chunks], np.uint64)
    rest = [(s.temperature, s.min_p, s.top_k, s.top_p) for s in samplings]
    return np.column_stack((uniforms(seeds, positions), rest))


def draw(logits: torch.Tensor, settings: np.ndarray) -> torch.Tensor:
    """int64 [n]: a token of each row at random; temperature first, then min-p, top-k and top-p.

    logits float32 [n, vocab], settings float64 [n, 5] of `draw_settings`
    """
    columns = torch.from_numpy(settings).to(logits.device).split(1, dim=-1)
    uniform, temperature, min_p, top_k, top_p = columns
    masses = probability_masses(logits, temperature.float().clamp_(min=1e-30))
    if settings[:, 2].any():
        masses = masses.masked_fill_(masses < min_p * MASS, 0)
    if most := int(min(settings[:, 3].max(), masses.shape[1])):
        masses = keep_top_k(masses, top_k.long(), most)
    if (settings[:, 4] < 1).any():
        masses = keep_top_p(masses, top_p)
    cumulative = masses.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum((uniform * total).floor(), total - 1)
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def probability_masses(logits: torch.Tensor, temperature: torch.Tensor | float) -> torch.Tensor:
    """float64 [n, vocab] of whole numbers in proportion to the probabilities, at most MASS."""
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    if scaled.device.type == "cpu":
        # torch takes another exp for what is left over after its vectors, and where that lies
        # depends on shape and threads.
        scaled = torch.from_numpy(np.exp(scaled.numpy(), out=scaled.numpy()))
    else:
        scaled = scaled.exp()
    return scaled.double().mul_(MASS).round_()


def keep_top_k(masses: torch.Tensor, top_k: torch.Tensor, most: int) -> torch.Tensor:
    """Zero but for the k greatest of each row and their equals; k = 0 keeps all. top_k [n, 1]."""
    greatest = masses.topk(most).values
    least = greatest.gather(-1, (top_k.clamp(1, most) - 1))
    return masses.where((masses >= least) | (top_k == 0), 0.0)


def keep_top_p(masses: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero but for the fewest greatest that together have the share p, and equals of the last."""
    total = masses.sum(-1, keepdim=True)
    # Fewer than 1 - p of all lies in tokens below this, so none of them can be the last one kept.
    floor = (1 - top_p) * total / (2 * masses.shape[1])
    ordered = masses[:, (masses >= floor).any(0)].sort(descending=True).values
    before = (ordered.cumsum(-1) < top_p * total).sum(-1, keepdim=True)
    least = ordered.gather(-1, before.clamp(max=ordered.shape[1] - 1))
    return masses.where(masses >= least, 0.0)


# --- logprobs ------------------------------------------------------------------------------------


def token_logprob(logits: np.ndarray, token: int, num_top: int) -> TokenLogprob:
    """Of the distribution before penalties, temperature and truncation. logits float32 [vocab]."""
    log_total = np.log(probability_masses(torch.from_numpy(logits)[None], 1.0).sum().item() / MASS)

    def logprob(ids: int | np.ndarray) -> np.ndarray:
        return logits[ids].astype(np.float64) - logits.max() - log_total

    top = _greatest(logits, min(num_top, len(logits)))
    return float(logprob(token)), tuple(top.tolist()), tuple(logprob(top).tolist())


def _greatest(values: np.ndarray, n: int) -> np.ndarray:
    """Ids of the n greatest values, greatest first, of equals the lower id first."""
    if n == 0:
        return np.zeros(0, np.int64)
    ids = np.flatnonzero(values >= np.partition(values, -n)[-n])
    return ids[np.argsort(-values[ids], kind="stable")][:n]
