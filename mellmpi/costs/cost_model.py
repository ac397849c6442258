"""What things take: an estimate, and data. It decides in the runtime and ticks the simulator."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

BLEND = 0.3  # weight of the newest measurement


@dataclass(frozen=True)
class CostModel:
    """Seconds as a function of tokens and bytes. The defaults are a laptop's, until measured."""

    prefill_token_s: float = 1.5e-3  # one position in a large chunk
    step_s: float = 10e-3  # a decode step, before its sequences
    decode_token_s: float = 2e-3  # one more sequence in a decode step
    link_Bps: float = 4e9
    link_latency_s: float = 1e-3
    wake_s: float = 2.0

    @property
    def step_seconds(self) -> tuple[float, float, float, float]:
        """Of (a step, a prefilled position, a decoded one, a position looked back on)."""
        return self.step_s, self.prefill_token_s, self.decode_token_s, 0.0

    @staticmethod
    def fitted(costs: dict[str, Any]) -> "CostModel":
        """What fits a run best, from the `costs` of its report; the default where it says nothing.

        Least squares with no coefficient below zero. ValueError if `costs` are not of a report.
        """
        try:
            steps, transfers, wakes = (
                _of_sums(costs[name]) for name in ("steps", "transfers", "wakes")
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
        """KV of so many bytes, from one worker to another."""
        return self.link_latency_s + num_bytes / self.link_Bps

    def forward_s(self, prefill_tokens: int, decode_tokens: int) -> float:
        """One pass over so many positions."""
        return (
            self.step_s
            + prefill_tokens * self.prefill_token_s
            + decode_tokens * self.decode_token_s
        )

    def after_transfer(self, num_bytes: int, transfer_s: float) -> "CostModel":
        """The estimate, having seen one transfer."""
        if transfer_s <= 0 or not num_bytes:
            return self
        measured = num_bytes / transfer_s
        return replace(self, link_Bps=(1 - BLEND) * self.link_Bps + BLEND * measured)

    def after_wake(self, wake_s: float) -> "CostModel":
        """The estimate, having seen one worker load."""
        return replace(self, wake_s=(1 - BLEND) * self.wake_s + BLEND * wake_s)

    def with_steps(self, seconds: np.ndarray) -> "CostModel":
        """Measured. float64: seconds of a step, of a prefilled position, of a decoded one, …"""
        step_s, prefill_s, decode_s = seconds[:3].tolist()
        return replace(self, step_s=step_s, prefill_token_s=prefill_s, decode_token_s=decode_s)


def _of_sums(sums: dict[str, Any]) -> list[float] | None:
    """Coefficients that fit these sums; None without samples."""
    if not sums["samples"]:
        return None
    return [float(v) for v in least_squares(np.array(sums["xx"]), np.array(sums["xy"]))]


def least_squares(xx: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Solve normal equations with no coefficient below zero. float64 [n, n], [n] -> [n]."""
    used, found = list(range(len(xy))), np.zeros(len(xy))
    while used:
        some = np.linalg.lstsq(xx[np.ix_(used, used)], xy[used], rcond=None)[0]
        if some.min() >= 0:
            found[used] = some
            break
        del used[int(some.argmin())]  # what would be negative is nothing
    return found
