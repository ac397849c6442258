"""One token at random from a row of logits, the same bits in any batch.

Rows meet only elementwise operations that are correctly rounded, and sums of whole numbers below
2**53, which come out alike in any order: probabilities are counted in units of 2**-34 of the
likeliest token's. `draw_row` is for a CPU, `draw_rows` for a device that wants whole batches; they
differ in the `exp` of the device alone. The cuts are min-p, then top-k, then top-p, the share of
what is left; tokens as likely as the last one kept are kept too.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

MASS = 2.0**34  # of the likeliest token; with up to 2**18 of them every sum stays below 2**53
RUN = 256  # masses summed at once
COLDEST, HOTTEST = 1e-30, 1e30  # temperatures: beyond them float32 has infinities, and no numbers


class Draw(NamedTuple):
    """What decides a token beside the logits."""

    uniform: float  # in [0, 1), a multiple of 2**-53
    temperature: float  # over 0
    min_p: float  # 0: off
    top_k: int  # 0: off
    top_p: float  # 1: off

    @property
    def cuts(self) -> bool:
        return self.min_p > 0 or self.top_k > 0 or self.top_p < 1


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) a row. uint64 [n], uint64 [n] -> float64 [n]. (splitmix64 finalizer)"""
    return (_mix(_mix(seeds) + positions) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- one row, on a CPU ---------------------------------------------------------------------------


def draw_row(logits: np.ndarray, how: Draw) -> int:
    """A token at random. logits float32 [vocab]; where they are not numbers, some token."""
    if not math.isfinite(logits.max()):  # broken weights, and no reason to lose a worker
        return int(logits.argmax())
    masses = row_masses(logits, how.temperature)
    if not how.cuts:
        return pick(masses, how.uniform)
    ids = kept(masses, how)
    return int(ids[pick(masses[ids], how.uniform)])


def row_masses(logits: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [vocab] of whole numbers in proportion to the probabilities, at most MASS.

    numpy's exp, not torch's, which takes another one for what is left over after its vectors.
    """
    scaled = logits - logits.max()
    scaled /= np.float32(min(max(temperature, COLDEST), HOTTEST))
    masses = np.exp(scaled, out=scaled).astype(np.float64)
    masses *= MASS
    return np.rint(masses, out=masses)


def kept(masses: np.ndarray, how: Draw) -> np.ndarray:
    """Ascending ids that min-p, top-k and top-p leave. Only what may be left is ever sorted."""
    total, least = 0.0, how.min_p * MASS
    if how.top_k:
        least = max(least, bound_of_greatest(masses, how.top_k))
    elif not how.min_p:
        total = masses.sum()
        least = _bound_of_share(how.top_p, total, len(masses))
    ids = np.flatnonzero(masses >= least)
    values = masses[ids]
    if 0 < how.top_k < len(ids):
        left = values >= np.partition(values, -how.top_k)[-how.top_k]
        ids, values = ids[left], values[left]
    if how.top_p < 1:
        ids = ids[values >= _least_of_share(values, how.top_p, total or values.sum())]
    return ids


def bound_of_greatest(values: np.ndarray, k: int) -> float:
    """At most the k-th greatest value: the k-th greatest maximum of a run, if there are k runs."""
    maxima = values[: len(values) // RUN * RUN].reshape(-1, RUN).max(1)
    return float(np.partition(maxima, -k)[-k]) if k <= len(maxima) else -math.inf


def _bound_of_share(top_p: float, total: float, num_tokens: int) -> float:
    """Tokens below this have less than half of what lies outside the share, even all together."""
    return (1 - top_p) * total / (2 * num_tokens)


def _least_of_share(values: np.ndarray, top_p: float, total: float) -> float:
    """The smallest of the fewest greatest values that together reach `top_p * total`."""
    greatest = values[values >= _bound_of_share(top_p, total, len(values))]
    greatest = np.sort(greatest)[::-1]
    before = int(np.searchsorted(greatest.cumsum(), top_p * total))
    return float(greatest[min(before, len(greatest) - 1)])


def pick(masses: np.ndarray, uniform: float) -> int:
    """The index where the running sum first exceeds the share `uniform` of the whole.

    By runs first: sums are several times faster than running sums, and exact all the same.
    """
    num_whole = len(masses) // RUN * RUN
    sums = np.append(masses[:num_whole].reshape(-1, RUN).sum(1), masses[num_whole:].sum())
    ends = sums.cumsum()
    target = np.floor(uniform * ends[-1])  # below the whole: no uniform exceeds 1 - 2**-53
    run = int(np.searchsorted(ends, target, side="right"))
    before = ends[run] - sums[run]
    inside = masses[run * RUN : (run + 1) * RUN].cumsum()
    return run * RUN + int(np.searchsorted(inside, target - before, side="right"))


# --- rows together, on any device ----------------------------------------------------------------


def draw_rows(logits: torch.Tensor, hows: list[Draw]) -> torch.Tensor:
    """int64 [n]: a token of each row at random. logits float32 [n, vocab]."""
    columns = torch.tensor(hows, dtype=torch.float64).to(logits.device).split(1, dim=-1)
    uniform, temperature, min_p, top_k, top_p = columns
    masses = _masses(logits, temperature.clamp(COLDEST, HOTTEST).float())
    if any(how.min_p > 0 for how in hows):
        masses = masses.where(masses >= min_p * MASS, 0.0)
    if most := min(max(how.top_k for how in hows), masses.shape[1]):
        masses = _keep_greatest(masses, top_k.long(), most)
    if any(how.top_p < 1 for how in hows):
        masses = _keep_share(masses, top_p)
    cumulative = masses.cumsum(-1)
    total = cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, (uniform * total).floor(), right=True)[:, 0]
    return ids.clamp_(max=masses.shape[1] - 1)  # where logits are not numbers


def _masses(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    scaled = (logits - logits.amax(-1, keepdim=True)).div_(temperature)
    return scaled.exp_().double().mul_(MASS).round_()


def _keep_greatest(masses: torch.Tensor, top_k: torch.Tensor, most: int) -> torch.Tensor:
    least = masses.topk(most).values.gather(-1, top_k.clamp(1, most) - 1)
    return masses.where((masses >= least) | (top_k == 0), 0.0)


def _keep_share(masses: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    ordered = masses.sort(descending=True).values
    running = ordered.cumsum(-1)
    before = (running < top_p * running[:, -1:]).sum(-1, keepdim=True)
    least = ordered.gather(-1, before.clamp_(max=masses.shape[1] - 1))
    return masses.where(masses >= least, 0.0)
