"""Random sampling of a token from a row of logits, with the same bits in any batch.

Probabilities are fixed-point numbers: whole multiples of 2**-34 of the likeliest token's. So all
sums are of whole numbers below 2**53, exact in any order, and all other operations are elementwise
and correctly rounded. `sample_row` is for CPUs, `sample_rows` for devices that compute whole
batches; only their `exp` differs. Truncation is by min-p, then top-k, then top-p (a share of the
remaining probability); a token as likely as the last one that is kept is kept, too.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

ONE = 2.0**34  # the likeliest token's probability; sums of up to 2**18 tokens stay below 2**53
RUN = 256  # probabilities summed at once
COLDEST, HOTTEST = 1e-30, 1e30  # temperatures; beyond them float32 overflows


class RowSampling(NamedTuple):
    """The sampling settings of one row, and its random number."""

    uniform: float  # in [0, 1), a multiple of 2**-53
    temperature: float  # above 0
    min_p: float  # 0: off
    top_k: int  # 0: off
    top_p: float  # 1: off

    @property
    def truncates(self) -> bool:
        return self.min_p > 0 or self.top_k > 0 or self.top_p < 1


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Random numbers in [0, 1) by splitmix64's finalizer: uint64 [n], uint64 [n] -> float64 [n]."""
    numbers: np.ndarray = (_finalize(_finalize(seeds) + positions) >> np.uint64(11)) * 2.0**-53
    return numbers


def _finalize(x: np.ndarray) -> np.ndarray:
    """Splitmix64's finalizer (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


# --- one row, on a CPU ---------------------------------------------------------------------------


def sample_row(logits: np.ndarray, sampling: RowSampling) -> int:
    """Sample a token. logits float32 [vocab]; if they are not finite, some token.

    Broken weights give such logits, and must not end a worker.
    """
    if not math.isfinite(logits.max()):
        return int(logits.argmax())
    probabilities = fixed_point_probabilities(logits, sampling.temperature)
    if not sampling.truncates:
        return invert_cdf(probabilities, sampling.uniform)
    ids = candidates(probabilities, sampling)
    return int(ids[invert_cdf(probabilities[ids], sampling.uniform)])


def fixed_point_probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of float32 logits [vocab] as float64 whole numbers, relative to ONE.

    By numpy's exp: torch's differs in the elements that remain after its last whole vector.
    """
    scaled = logits - logits.max()
    scaled /= np.float32(min(max(temperature, COLDEST), HOTTEST))
    probabilities: np.ndarray = np.exp(scaled, out=scaled).astype(np.float64)
    probabilities *= ONE
    np.rint(probabilities, out=probabilities)
    return probabilities


def candidates(probabilities: np.ndarray, sampling: RowSampling) -> np.ndarray:
    """Ascending ids int64 of the tokens that min-p, top-k and top-p keep.

    A lower bound of the threshold excludes most tokens before anything is sorted.
    """
    total, threshold = 0.0, sampling.min_p * ONE
    if sampling.top_k:
        threshold = max(threshold, bound_of_kth_greatest(probabilities, sampling.top_k))
    elif not sampling.min_p:
        total = probabilities.sum()
        threshold = _bound_of_top_p(sampling.top_p, total, len(probabilities))
    ids = np.flatnonzero(probabilities >= threshold)
    values = probabilities[ids]
    if 0 < sampling.top_k < len(ids):
        is_kept = values >= np.partition(values, -sampling.top_k)[-sampling.top_k]
        ids, values = ids[is_kept], values[is_kept]
    if sampling.top_p < 1:
        ids = ids[values >= _threshold_of_top_p(values, sampling.top_p, total or values.sum())]
    return ids


def bound_of_kth_greatest(values: np.ndarray, k: int) -> float:
    """A lower bound of the k-th greatest value: the k-th greatest maximum of the runs of `RUN`.

    -inf if there are fewer than k runs.
    """
    maxima = values[: len(values) // RUN * RUN].reshape(-1, RUN).max(1)
    return float(np.partition(maxima, -k)[-k]) if k <= len(maxima) else -math.inf


def _bound_of_top_p(top_p: float, total: float, num_tokens: int) -> float:
    """A lower bound of top-p's threshold: all tokens below it sum to at most (1 - top_p) / 2."""
    return (1 - top_p) * total / (2 * num_tokens)


def _threshold_of_top_p(values: np.ndarray, top_p: float, total: float) -> float:
    """The smallest of the fewest greatest values whose sum reaches `top_p * total`."""
    greatest = values[values >= _bound_of_top_p(top_p, total, len(values))]
    greatest = np.sort(greatest)[::-1]
    before = int(np.searchsorted(greatest.cumsum(), top_p * total))
    return float(greatest[min(before, len(greatest) - 1)])


def invert_cdf(probabilities: np.ndarray, uniform: float) -> int:
    """The first index whose running sum exceeds `uniform` times the total.

    By runs first: sums are several times faster than running sums, and exact, too.
    """
    whole = len(probabilities) // RUN * RUN
    last = probabilities[whole:].sum()
    sums = np.append(probabilities[:whole].reshape(-1, RUN).sum(1), last)
    ends = sums.cumsum()
    target = np.floor(uniform * ends[-1])  # below the total: `uniform` is at most 1 - 2**-53
    run = int(np.searchsorted(ends, target, side="right"))
    before = ends[run] - sums[run]
    inside = probabilities[run * RUN : (run + 1) * RUN].cumsum()
    return run * RUN + int(np.searchsorted(inside, target - before, side="right"))


# --- rows together, on any device ----------------------------------------------------------------


def sample_rows(logits: torch.Tensor, settings: list[RowSampling]) -> torch.Tensor:
    """Sample a token of each row: int64 [n]. logits float32 [n, vocab]."""
    columns = torch.tensor(settings, dtype=torch.float64).to(logits.device)
    uniform, temperature, min_p, top_k, top_p = torch.split(columns, 1, dim=-1)
    probabilities = _fixed_point_probabilities(logits, temperature.clamp(COLDEST, HOTTEST).float())
    if any(sampling.min_p > 0 for sampling in settings):
        probabilities = probabilities.where(probabilities >= min_p * ONE, 0.0)
    if most := min(max(sampling.top_k for sampling in settings), probabilities.shape[1]):
        probabilities = _keep_top_k(probabilities, top_k.long(), most)
    if any(sampling.top_p < 1 for sampling in settings):
        probabilities = _keep_top_p(probabilities, top_p)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, (uniform * total).floor(), right=True)[:, 0]
    return ids.clamp_(max=probabilities.shape[1] - 1)  # where logits are not finite


def _fixed_point_probabilities(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    return scaled.exp_().double().mul_(ONE).round_()


def _keep_top_k(probabilities: torch.Tensor, top_k: torch.Tensor, most: int) -> torch.Tensor:
    threshold = probabilities.topk(most).values.gather(-1, top_k.clamp(1, most) - 1)
    return probabilities.where((probabilities >= threshold) | (top_k == 0), 0.0)


def _keep_top_p(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    ordered = probabilities.sort(descending=True).values
    running = ordered.cumsum(-1)
    before = (running < top_p * running[:, -1:]).sum(-1, keepdim=True)
    threshold = ordered.gather(-1, before.clamp_(max=probabilities.shape[1] - 1))
    return probabilities.where(probabilities >= threshold, 0.0)
