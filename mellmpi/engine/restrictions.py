"""Restrictions of a request on its next token: biases, minimum length, allowed ids, grammar.

Applied after penalties and before temperature and truncation, in this order: a bias never lifts a
restriction. A token that may not come has the logit -inf, so that it has no share of the random
number's range.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mellmpi.engine.grammar import Masks, put
from mellmpi.protocol import Chunk, Sampling

MANY = 8  # a share 1/MANY of the tokens: lists of more ids take longer than whole rows


def restrict(logits: torch.Tensor, chunks: Sequence[Chunk], masks: Masks) -> dict[int, np.ndarray]:
    """Apply the restrictions in place.

    logits   float32 [chunks, vocab]
    masks    of the rows with a grammar, from `Grammars`
    returns  row -> int64 ids of the only tokens that may come; on CPUs, where they are few
    """
    _add_biases(logits, chunks)
    allowed = dict(masks)
    without_mask: list[tuple[int, int]] = []  # (row, id) of stop tokens that may not come yet
    for row, chunk in enumerate(chunks):
        s = chunk.sampling
        assert s is not None, f"request {chunk.request_id}: not a sampled chunk"
        if s.allowed_token_ids and row not in allowed:
            allowed[row] = _mask_of(s.allowed_token_ids, logits.shape[1])
        if s.min_tokens > len(chunk.history[1]):
            if row in allowed:
                allowed[row] = _without_stops(allowed[row], s)
            else:
                without_mask += [(row, token) for token in s.stop_token_ids]
    if without_mask:
        rows, ids = torch.tensor(without_mask).T.to(logits.device)
        logits[rows, ids] = -torch.inf
    if logits.device.type == "cpu":
        kept = ((row, _keep(logits[row].numpy(), mask)) for row, mask in allowed.items())
        return {row: ids for row, ids in kept if ids is not None}
    if allowed:
        _mask(logits, allowed)
    return {}


def _add_biases(logits: torch.Tensor, chunks: Sequence[Chunk]) -> None:
    biases = [
        (row, token, bias)
        for row, chunk in enumerate(chunks)
        if chunk.sampling is not None
        for token, bias in chunk.sampling.logit_bias
    ]
    if biases:
        rows, ids, values = zip(*biases, strict=True)
        at = torch.tensor([rows, ids]).to(logits.device)
        logits[at[0], at[1]] += torch.tensor(values, dtype=torch.float32).to(logits.device)


def _mask_of(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    flags = np.zeros(vocab_size, bool)
    flags[list(ids)] = True
    return np.packbits(flags, bitorder="little")


def _without_stops(mask: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return the mask without stop tokens, or as it is if it allows nothing else."""
    longer = mask.copy()
    put(longer, sampling.stop_token_ids, False)
    return longer if longer.any() else mask


def _keep(row: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Set the logits of a row outside the mask to -inf. Returns the mask's ids if they are few."""
    allowed = np.unpackbits(mask, count=len(row), bitorder="little").view(bool)
    if int(np.bitwise_count(mask).sum()) > len(row) // MANY:
        np.copyto(row, np.float32(-np.inf), where=~allowed)
        return None
    ids = np.flatnonzero(allowed)
    kept = row[ids]
    row.fill(-np.inf)
    row[ids] = kept
    return ids


def _mask(logits: torch.Tensor, allowed: Mapping[int, np.ndarray]) -> None:
    """As `_keep`, for rows on any device."""
    rows = torch.tensor(list(allowed)).to(logits.device)
    packed = torch.from_numpy(np.stack(list(allowed.values()))).to(logits.device)
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device) & 1
    banned = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill(banned, -torch.inf)
