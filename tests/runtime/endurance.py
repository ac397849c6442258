"""Long runs with migrations of every mode, and cancels.

`python -m tests.runtime.endurance 10000`        workers of one process, an engine of hashes
`python -m tests.runtime.endurance 10000 --mpi`  processes under mpirun, a tiny model

Every answer is compared with that of a run without migrations; at the end no worker holds KV.
"""

import json
import random
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mellmpi.protocol import Cancel, Request, Submit
from mellmpi.sim.executor import expected_outputs
from tests.mpi.harness import run_job
from tests.runtime.cell import ListFront, hashing, request

OPEN = 24  # open requests at any time
CANCELLED = 0.0125  # share of the iterations that cancel a request

Draw = Callable[[int, random.Random], tuple[Request, list[int]]]  # id -> request, its answer


class EndlessFront(ListFront):
    """Submits a new request for each that has ended, and cancels some at random."""

    def __init__(self, rng: random.Random, draw: Draw, cancelled: float = CANCELLED):
        super().__init__([])
        self.rng, self.draw, self.cancelled = rng, draw, cancelled
        self.expected = dict[int, list[int]]()  # by open request
        self.stopped, self.wrong = False, list[int]()
        self.num_cancelled = self.num_checked = 0

    @property
    def done(self) -> bool:
        return self.stopped and not self.expected

    def inbox(self, now: float) -> list[Any]:
        events: list[Any] = []
        while len(self.expected) < OPEN and not self.stopped:
            r, expected = self.draw(self.num_checked + len(self.expected), self.rng)
            self.expected[r.id], self.outputs[r.id] = expected, []
            events.append(Submit(r))
        if self.rng.random() < self.cancelled and self.expected:
            request_id = self.rng.choice(sorted(self.expected))
            events.append(Cancel(request_id, "gone"))
            self.finish(request_id)
            self.num_cancelled += 1
        return events

    def deliver(self, command: Any) -> None:
        if command.request_id not in self.expected:
            return  # cancelled
        super().deliver(command)
        if command.request_id in self.ended:
            self.finish(command.request_id)

    def finish(self, request_id: int) -> None:
        """Compare the answer, and forget it: memory must not grow."""
        outputs, expected = self.outputs.pop(request_id), self.expected.pop(request_id)
        is_complete = self.ended.pop(request_id, None) is not None
        if outputs != (expected if is_complete else expected[: len(outputs)]):
            self.wrong.append(request_id)
        self.num_checked += 1

    def counts(self) -> dict[str, Any]:
        return {
            "checked": self.num_checked,
            "cancelled": self.num_cancelled,
            "wrong": self.wrong,
        }


def draw_hashed(request_id: int, rng: random.Random) -> tuple[Request, list[int]]:
    drawn = request(request_id, rng.randint(1, 40), rng.randint(1, 60))
    return drawn, expected_outputs(drawn)


def moves(metrics: Any) -> int:
    return sum(metrics.moves.moved.values())


def endure(num_moves: int, seed: int = 0) -> dict[str, Any]:
    """Run until this number of migrations. Returns counts, and what the workers still hold."""
    cell = hashing(4, num_blocks=120, migrate="stress", policy="worst_fit", seed=seed)
    front = EndlessFront(random.Random(seed), draw_hashed)
    rss = []
    for part in range(1, 5):
        enough = part * num_moves // 4
        cell.run(front, lambda enough=enough: moves(cell.metrics) >= enough, max_iterations=10**9)
        rss.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    front.stopped = True
    cell.run(front)
    for _ in range(2000):
        cell.run_once(front)
    return {
        **front.counts(),
        "moves": cell.metrics.report(1.0)["migrations"],
        "outcomes": cell.metrics.report(1.0)["migration_outcomes"],
        "left": [left(worker) for worker in cell.workers.values()],
        "in_flight": sum(map(abs, cell.scheduler.registry.in_flight.bytes_between.values())),
        "rss_mb": [round(kb / 1024, 1) for kb in rss],
    }


def left(worker: Any) -> dict[str, int]:
    """Return what a worker without requests still holds; {}: nothing."""
    batch = worker._batch  # a worker parks only when it holds nothing
    held = {
        "sequences": len(batch.sequences),
        "lingering": len(batch.lingering),
        "transfers": len(worker._transfers),
        "blocks": batch.pool.num_blocks - batch.pool.num_free,
    }
    return {name: count for name, count in held.items() if count}


def endure_under_mpirun(num_moves: int, num_ranks: int = 4, limit_s: float = 900) -> dict[str, Any]:
    """The same run between processes, see `tests.runtime.endurance_rank`."""
    with tempfile.TemporaryDirectory() as name:
        module, directory = "tests.runtime.endurance_rank", Path(name)
        outcome = run_job(num_ranks, module, str(num_moves), directory=directory, limit_s=limit_s)
    assert outcome.returncode == 0 and all(outcome.verdicts), outcome.output
    scheduler, *workers = outcome.verdicts
    return {
        **scheduler,
        "left": [worker["left"] for worker in workers],
        "rss_mb": [verdict["rss_mb"] for verdict in outcome.verdicts],
    }


if __name__ == "__main__":
    run = endure_under_mpirun if "--mpi" in sys.argv else endure
    for name, value in run(int(sys.argv[1])).items():
        sys.stdout.write(f"{name}: {json.dumps(value)}\n")
