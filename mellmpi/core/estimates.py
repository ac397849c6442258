"""All that has been measured of a cell, and what it says a move would take."""

from collections import deque
from statistics import median

from mellmpi.core.cost import CostModel
from mellmpi.core.links import Link, Links
from mellmpi.core.step_times import EXPECTED_BATCH, StepTimes

WINDOW = 9  # newest migrations of one mode
AROUND_S = 5e-3  # messages that wait for step boundaries, before anything was measured


class Estimates:
    """Links, steps, and the time that messages around a migration take."""

    def __init__(self, prior: CostModel):
        self.links = Links(Link(prior.link_latency_s, prior.link_Bps))
        self.steps = StepTimes(prior)
        self._around: dict[str, deque[float]] = {}

    def prefill_s(self, worker: int, num_tokens: int, before: int = 0, num_decoding: int = 0,
                  batch: int = EXPECTED_BATCH) -> float:  # fmt: skip
        """Computing so many positions there, behind `before` others that it has been given."""
        alone = self.steps.prefill_s(worker, num_tokens, num_decoding, batch)
        return alone * (1 + before / max(1, num_tokens))

    def last_round_s(self, src: int, dst: int, block_bytes: int) -> float:
        """The blocks for which the source stops, at most two."""
        return self.links.between(src, dst).transfer_s(2 * block_bytes)

    def around_s(self, mode: str) -> float:
        """What a migration takes beyond its bytes and its computing."""
        samples = self._around.get(mode)
        return median(samples) if samples else AROUND_S

    def took(self, mode: str, predicted_s: float, took_s: float) -> None:
        """A migration is over; `predicted_s` was the prediction with `around_s` in it."""
        samples = self._around.setdefault(mode, deque(maxlen=WINDOW))
        known_s = median(samples) if samples else AROUND_S
        samples.append(max(0.0, took_s - (predicted_s - known_s)))
