"""Durations as linear functions of tokens and bytes, for decisions and for the simulator."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

BLEND = 0.3  # weight of the newest measurement


@dataclass(frozen=True)
class CostModel:
    """Seconds as a linear function of tokens and bytes. The defaults are those of a laptop."""

    prefill_token_s: float = 1.5e-3  # one prompt position in a large chunk
    step_s: float = 10e-3  # a decode step without its sequences
    decode_token_s: float = 2e-3  # each sequence in a decode step
    link_Bps: float = 4e9
    link_latency_s: float = 1e-3
    wake_s: float = 2.0  # loading the models of a parked worker

    @property
    def step_seconds(self) -> tuple[float, float, float, float]:
        """Seconds of (a step, a prefilled position, a decoded one, an attended one)."""
        return self.step_s, self.prefill_token_s, self.decode_token_s, 0.0

    @staticmethod
    def fitted(costs: Mapping[str, Any]) -> "CostModel":
        """Fit to a run, by non-negative least squares on the `costs` of its report.

        Without samples of a cost, its default stays. Raises ValueError if `costs` does not come
        from a report.
        """
        try:
            steps, transfers, wakes = (
                _coefficients(costs[name]) for name in ("steps", "transfers", "wakes")
            )
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"these are not the costs of a report: {error!r}") from error
        found: dict[str, float] = {}
        if steps is not None:
            found |= zip(("step_s", "prefill_token_s", "decode_token_s"), steps, strict=True)
        if transfers is not None:
            latency_s, byte_s = transfers
            found |= {"link_latency_s": latency_s, "link_Bps": 1 / byte_s if byte_s else np.inf}
        if wakes is not None:
            found["wake_s"] = wakes[0]
        return CostModel(**found)

    def transfer_s(self, num_bytes: int) -> float:
        """Seconds to transfer `num_bytes` of KV from one worker to another."""
        return self.link_latency_s + num_bytes / self.link_Bps

    def forward_s(self, prefill_tokens: int, decode_tokens: int) -> float:
        """Seconds of one forward pass over these positions."""
        return (
            self.step_s
            + prefill_tokens * self.prefill_token_s
            + decode_tokens * self.decode_token_s
        )

    def after_transfer(self, num_bytes: int, transfer_s: float) -> "CostModel":
        """The model with the bandwidth of one more transfer blended in."""
        if transfer_s <= 0 or not num_bytes:
            return self
        measured = num_bytes / transfer_s
        return replace(self, link_Bps=(1 - BLEND) * self.link_Bps + BLEND * measured)

    def after_wake(self, wake_s: float) -> "CostModel":
        """The model with the duration of one more wake blended in."""
        return replace(self, wake_s=(1 - BLEND) * self.wake_s + BLEND * wake_s)

    def with_steps(self, seconds: np.ndarray) -> "CostModel":
        """The model with the measured `StepTimes.coefficients`, float64 [4]."""
        step_s, prefill_s, decode_s = seconds[:3].tolist()
        return replace(self, step_s=step_s, prefill_token_s=prefill_s, decode_token_s=decode_s)


def _coefficients(sums: Mapping[str, Any]) -> list[float] | None:
    """Least-squares coefficients for the sums of a report; None without samples."""
    if not sums["samples"]:
        return None
    return [float(v) for v in least_squares(np.array(sums["xx"]), np.array(sums["xy"]))]


def least_squares(xx: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Solve the normal equations xx · b = xy with b >= 0: float64 [n, n], [n] -> [n].

    The most negative coefficient is set to zero and the rest solved again, until none is negative.
    """
    used, found = list(range(len(xy))), np.zeros(len(xy))
    while used:
        solution = np.linalg.lstsq(xx[np.ix_(used, used)], xy[used], rcond=None)[0]
        if solution.min() >= 0:
            found[used] = solution
            break
        del used[int(solution.argmin())]
    return found
