"""Fault histories whose events and commands are observed, as on rank 0."""

from collections import Counter
from typing import Any

from mellmpi.protocol import SCHEDULER
from mellmpi.scheduler import Commands
from mellmpi.sim import Simulation
from mellmpi.telemetry import Metrics
from tests.sim.histories import random_history


class Observed(Simulation):
    """Passes everything to `metrics` and `others`; compares owners after every 16th event."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.metrics, self.others, self._events = Metrics(), [], 0

    def _to_scheduler(self, source: Any, event: Any) -> None:
        for observer in (self.metrics, *self.others):
            observer.observe(self.now, source, event)
        self._observed(self.scheduler.handle(source, event, self.now))

    def _tick(self) -> None:
        self._observed(self.scheduler.tick(self.now))
        if self._live > 0:
            self.later(self.config.rebalance_every_s, self._tick)

    def _observed(self, commands: Commands) -> None:
        for observer in (self.metrics, *self.others):
            observer.commands(self.now, commands)
        self._events += 1
        if self._events % 16 == 0:
            self._check_owners()
        self._route(SCHEDULER, commands)

    def _check_owners(self) -> None:
        samples = self.metrics.samples(self.now)
        rows = samples["num_requests_running"] + samples.get("num_requests_waiting", [])
        records = self.scheduler.records.values()
        owners = Counter((r.request.model, str(r.worker or 0)) for r in records)
        assert {labels: n for labels, n in rows if n} == owners


def observed(seed: int, *others: Any) -> Observed:
    """A history that has run to its end."""
    sim, _ = random_history(seed, Observed)
    sim.others += others
    sim.run()
    return sim
