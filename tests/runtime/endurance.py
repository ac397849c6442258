"""Moves in every way, and cancels, for long: `python -m tests.runtime.endurance 10000`.

Answers are compared with those of a run that moves nothing (hashes of all the KV they should have
seen), and at the end nobody holds anything.
"""

import random
import resource
import sys
from typing import Any

from mellmpi.protocol import Cancel, Submit
from mellmpi.sim.executor import expected_outputs
from tests.runtime.cell import ListFront, hashing, request

OPEN = 24  # requests at any time
CANCELLED = 0.05  # of all


class EndlessFront(ListFront):
    """Submits a new request for each that has ended, and now and then cancels one."""

    def __init__(self, rng: random.Random):
        super().__init__([])
        self.rng, self.live = rng, dict[int, Any]()
        self.open: set[int] = set()
        self.stopped, self.wrong = False, list[int]()
        self.num_cancelled = self.num_checked = 0

    @property
    def done(self) -> bool:
        return self.stopped and not self.open

    def inbox(self, now: float) -> list[Any]:
        events: list[Any] = []
        while len(self.open) < OPEN and not self.stopped:
            r = request(self.num_checked + len(self.open), self.rng.randint(1, 40),
                        self.rng.randint(1, 60))  # fmt: skip
            self.live[r.id], self.outputs[r.id] = r, []
            self.open.add(r.id)
            events.append(Submit(r))
        if self.rng.random() < CANCELLED / 4 and self.open:
            request_id = self.rng.choice(sorted(self.open))
            events.append(Cancel(request_id, "gone"))
            self.over(request_id)
            self.num_cancelled += 1
        return events

    def deliver(self, command: Any) -> None:
        if command.request_id not in self.open:
            return  # cancelled a moment ago
        super().deliver(command)
        if command.request_id in self.ended:
            self.over(command.request_id)

    def over(self, request_id: int) -> None:
        """Compare what it got, and forget it: memory has to stay flat."""
        self.open.discard(request_id)
        outputs, expected = self.outputs.pop(request_id), expected_outputs(self.live[request_id])
        whole = self.ended.pop(request_id, None) is not None
        if outputs != (expected if whole else expected[: len(outputs)]):
            self.wrong.append(request_id)
        self.num_checked += 1
        del self.live[request_id]


def endure(num_moves: int, seed: int = 0) -> dict[str, Any]:
    """So many moves; what happened meanwhile, and what is left."""
    cell = hashing(4, num_blocks=120, migrate="stress", policy="worst_fit", seed=seed)
    front = EndlessFront(random.Random(seed))

    def moves() -> int:
        return sum(cell.metrics._moved.values())

    rss = []
    for part in range(1, 5):
        cell.run(front, until=lambda part=part: moves() >= part * num_moves // 4, max_turns=10**9)
        rss.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    front.stopped = True
    cell.run(front)
    for _ in range(2000):
        cell.turn(front)
    batches = [worker._batch for worker in cell.workers.values() if worker._engine is not None]
    return {
        "moves": cell.metrics.report(1.0)["migrations"], "checked": front.num_checked,
        "cancelled": front.num_cancelled, "wrong": front.wrong,
        "outcomes": cell.metrics.report(1.0)["migration_outcomes"],
        "held": sum(len(b.sequences) + len(b.lingering) for b in batches),
        "leaked": sum(b.pool.num_blocks - b.pool.num_free for b in batches),
        "in_flight": sum(map(abs, cell.scheduler.fleet.in_flight.bytes_between.values())),
        "rss_mb": [round(kb / 1024, 1) for kb in rss],
    }  # fmt: skip


if __name__ == "__main__":
    for name, value in endure(int(sys.argv[1])).items():
        sys.stdout.write(f"{name}: {value}\n")
