"""All that has been measured of a cell, and what it says a move would take."""

from mellmpi.costs.cost_model import CostModel
from mellmpi.costs.links import LOOK_AGAIN_S, Link, Links
from mellmpi.costs.migration_overhead import MigrationOverhead
from mellmpi.costs.step_times import StepTimes

MESSAGES_S = 3e-3  # of a move, between loops that sleep


class Estimates:
    """Links, steps, and what moves take beyond them."""

    def __init__(self, prior: CostModel):
        self.links = Links(Link(prior.link_latency_s, prior.link_Bps))
        self.steps = StepTimes(prior)
        self._beyond: dict[tuple[str, tuple[int, int] | None], MigrationOverhead] = {}
        self._looked_s = 0.0

    def prefill_s(self, worker: int, num_tokens: int, before: int, num_decoding: int) -> float:
        """Computing so many positions there, behind `before` others that it has been given."""
        alone = self.steps.prefill_s(worker, num_tokens, num_decoding)
        return alone * (1 + before / max(1, num_tokens))

    def last_round_s(self, src: int, dst: int, block_bytes: int) -> float:
        """The blocks for which the source stops, at most two."""
        return self.links.between(src, dst).transfer_s(2 * block_bytes)

    def wait_s(self, src: int, dst: int, turns: tuple[float, float]) -> float:
        """Messages, and so many steps of the source and of the destination."""
        steps_s = turns[0] * self.steps.pace_s(src) + turns[1] * self.steps.pace_s(dst)
        return MESSAGES_S + steps_s

    def move_s(self, mode: str, hosts: tuple[int, int], wait_s: float, work_s: float) -> float:
        """What a move takes whose bytes and computing, whichever is longer, take `work_s`."""
        return self._of(mode, hosts).took_s(wait_s, work_s)

    def took(
        self, mode: str, hosts: tuple[int, int], wait_s: float, work_s: float, took_s: float
    ) -> None:
        """A move, or its pause, is over; so much was expected of its waiting and its work."""
        self._of(mode, hosts).add(wait_s, work_s, took_s)
        self._of(mode).add(wait_s, work_s, took_s)

    def _of(self, mode: str, hosts: tuple[int, int] | None = None) -> MigrationOverhead:
        """What is known of these moves; of a pair of hosts, at first that of all pairs."""
        if (mode, hosts) not in self._beyond:
            like = self._of(mode) if hosts is not None else None
            self._beyond[mode, hosts] = MigrationOverhead(like)
        return self._beyond[mode, hosts]

    def look_again(self, now: float) -> None:
        """What was not tried for long may have changed."""
        self.links.look_again(now)
        if now - self._looked_s >= LOOK_AGAIN_S:
            self._looked_s = now
            for beyond in self._beyond.values():
                beyond.age()
