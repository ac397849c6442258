"""All measurements of a cell, and the duration of a migration estimated from them."""

from mellmpi.costs.cost_model import CostModel
from mellmpi.costs.links import STALE_S, Link, Links
from mellmpi.costs.migration_overhead import MigrationOverhead
from mellmpi.costs.step_times import StepTimes

MESSAGES_S = 3e-3  # all messages of a migration, between event loops that sleep


class Estimates:
    """Links, step times, and the overhead of migrations by mode and pair of hosts."""

    def __init__(self, prior: CostModel):
        self.links = Links(Link(prior.link_latency_s, prior.link_Bps))
        self.steps = StepTimes(prior)
        self._overheads: dict[tuple[str, tuple[int, int] | None], MigrationOverhead] = {}
        self._aged_s = 0.0

    def prefill_s(self, worker: int, num_tokens: int, before: int, num_decoding: int) -> float:
        """Seconds to compute `num_tokens` on a worker that has `before` others queued."""
        alone_s = self.steps.prefill_s(worker, num_tokens, num_decoding)
        return alone_s * (1 + before / max(1, num_tokens))

    def last_round_s(self, src: int, dst: int, block_bytes: int) -> float:
        """Seconds of the last transfer, during which the sequence pauses: two blocks at most."""
        return self.links.between(src, dst).transfer_s(2 * block_bytes)

    def wait_s(self, src: int, dst: int, num_steps: tuple[float, float]) -> float:
        """Seconds of the messages and of (source, destination) steps that a migration waits for."""
        steps_s = num_steps[0] * self.steps.pace_s(src) + num_steps[1] * self.steps.pace_s(dst)
        return MESSAGES_S + steps_s

    def move_s(self, mode: str, hosts: tuple[int, int], wait_s: float, work_s: float) -> float:
        """Seconds of a migration; `work_s`: the longer of its transfer and its computation."""
        return self._overhead(mode, hosts).total_s(wait_s, work_s)

    def record_move(
        self, mode: str, hosts: tuple[int, int], wait_s: float, work_s: float, took_s: float
    ) -> None:
        """Learn from a migration, or its pause, that took `took_s`; the others were expected."""
        self._overhead(mode, hosts).add(wait_s, work_s, took_s)
        self._overhead(mode).add(wait_s, work_s, took_s)

    def _overhead(self, mode: str, hosts: tuple[int, int] | None = None) -> MigrationOverhead:
        """The overhead for a pair of hosts, with that of all pairs (None) as its prior."""
        if (mode, hosts) not in self._overheads:
            prior = self._overhead(mode) if hosts is not None else None
            self._overheads[mode, hosts] = MigrationOverhead(prior)
        return self._overheads[mode, hosts]

    def forget_stale(self, now: float) -> None:
        """Move estimates without recent measurements back towards their priors."""
        self.links.forget_stale(now)
        if now - self._aged_s >= STALE_S:
            self._aged_s = now
            for overhead in self._overheads.values():
                overhead.age()
