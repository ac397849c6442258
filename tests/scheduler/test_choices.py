"""The choice of modes on a synthetic machine, after learning from some moves.

As in bench/crossover.py: three links, contexts of 128 to 8,192 tokens, noisy times, and a
destination that computes and receives concurrently more slowly than one after the other.
"""

import random
from dataclasses import dataclass, field, replace

import pytest

from mellmpi.costs import CostModel, Estimates
from mellmpi.protocol import LinksMeasured
from mellmpi.scheduler import RECOMPUTE, InFlight, Plan
from mellmpi.scheduler.planner import SPLIT, TRANSFER, Candidate, decide
from tests.scheduler.stage import report

CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
BLOCK_SIZE, BLOCK_BYTES, BATCH = 16, 1 << 19, 512
LIMIT_S = 1e6


@dataclass
class Machine:
    """Two workers; durations of all modes, without and with noise."""

    Bps: float
    fixed_s: float  # of messages
    overlap: float  # factor by which concurrent computing and receiving slow down
    noise: float = 0.15
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def computing_s(self, n: int) -> float:
        return -(-n // BATCH) * 1.5e-3 + n * 9e-5 + n * n / 2 * 1e-7

    def took_s(self, plan: Plan) -> float:
        """Seconds of a migration, without noise."""
        if plan.mode == RECOMPUTE:
            return self.fixed_s / 3 + self.computing_s(plan.start)
        if plan.mode == TRANSFER:
            return self.fixed_s + plan.num_bytes / self.Bps
        work_s = max(plan.num_bytes / self.Bps, self.computing_s(plan.start))
        return 1.2 * self.fixed_s + self.overlap * work_s

    def scattered(self, seconds: float) -> float:
        return seconds * self.rng.lognormvariate(0, self.noise)


MACHINES = {
    "shared memory": (4e9, 4e-3, 1.5),
    "10 Gbit/s": (1.1e9, 9e-3, 1.3),
    "1 Gbit/s": (117e6, 9e-3, 1.05),
}


class Cell:
    """The estimates of rank 0, which learn from the moves that it plans."""

    def __init__(self, machine: Machine):
        self.machine, self.estimates = machine, Estimates(CostModel())
        Bps = machine.scattered(machine.Bps)
        self.estimates.links.measured(LinksMeasured((0, 1), (0,), (1,), (1e-4,), (Bps,)))

    def plan(self, context: int, mode: str | None = None) -> Plan:
        modes = (TRANSFER, RECOMPUTE, SPLIT) if mode is None else (mode,)
        move = Candidate(1, 2, context, BLOCK_SIZE, BLOCK_BYTES, 0, BATCH, modes, mode is not None)
        [plan] = decide([move], self.estimates, InFlight(), LIMIT_S)
        return plan

    def move(self, context: int, mode: str | None = None) -> tuple[Plan, float]:
        """Plan a move and learn from it; return the plan and the seconds that it took."""
        plan, machine = self.plan(context, mode), self.machine
        took_s = machine.scattered(machine.took_s(plan))
        if plan.start:
            self._computed(plan.start)
        if plan.num_bytes:
            transfer_s = machine.scattered(plan.num_bytes / machine.Bps)
            self.estimates.links.record_transfer(1, 2, plan.num_bytes, transfer_s, 0.0)
        self.estimates.record_move(plan.mode, (0, 1), plan.wait_s, plan.work_s, took_s)
        return plan, took_s

    def _computed(self, n: int) -> None:
        """Add a report for each step of a prefill of n tokens."""
        for start in range(0, n, BATCH):
            end = min(n, start + BATCH)
            seconds = self.machine.computing_s(end) - self.machine.computing_s(start)
            step = replace(
                report(),
                steps=1,
                prefill_tokens=end - start,
                decode_tokens=0,
                attended=(end * end - start * start) // 2,
                step_s=self.machine.scattered(seconds),
            )
            self.estimates.steps.add(2, step)
        self.estimates.steps.fold()


@pytest.fixture(scope="module", params=range(5))
def grid(request):
    """By link and context: (seconds over those of the fastest mode, relative prediction error)."""
    found = {}
    for name, numbers in MACHINES.items():
        cell = Cell(Machine(*numbers, rng=random.Random(request.param)))
        for context in (512, 2048, 512, 2048):
            for mode in (TRANSFER, RECOMPUTE, SPLIT):
                cell.move(context, mode)
        for context in CONTEXTS:
            for _ in range(4):
                forced = [cell.move(context, m)[0] for m in (TRANSFER, RECOMPUTE, SPLIT)]
                chosen, took_s = cell.move(context)
            seconds = {p.mode: cell.machine.took_s(p) for p in forced}
            over = seconds[chosen.mode] / min(seconds.values())
            found[name, context] = (over, abs(chosen.seconds - took_s) / took_s)
    return found


def test_nine_of_ten_choices_are_within_a_tenth_of_the_fastest_mode(grid):
    assert sum(over <= 1.1 for over, _ in grid.values()) >= 0.9 * len(grid)


def test_no_choice_takes_a_third_longer_than_the_fastest_mode(grid):
    assert max(over for over, _ in grid.values()) <= 1.3


def test_predictions_are_within_a_quarter_in_the_median(grid):
    errors = sorted(error for _, error in grid.values())
    assert errors[len(errors) // 2] <= 0.25
