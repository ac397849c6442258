"""Simulates a real run from its report: the same requests, measured costs, and start times.

Workers start when the real ones did; steps, transfers and wakes cost what was fitted to the report.
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from mellmpi.config import Config
from mellmpi.costs import CostModel
from mellmpi.frontend import ReplayJob, ServedModel
from mellmpi.protocol import Emit, ModelKv, Rejected, Request
from mellmpi.runtime.worker import REPORT_EVERY_S
from mellmpi.sim import Network, SilentExecutor, Simulation, SimWorker, WorkerSpec
from mellmpi.telemetry import Metrics
from mellmpi.workload import Workload

MESSAGE_S = 3e-4  # between two processes of a host, if the receiver polls


class Observed:
    """The cluster scheduler with metrics of its events and commands, as in the runtime's loop."""

    def __init__(self, scheduler: Any, num_requests: int):
        self._scheduler, self.records = scheduler, scheduler.records
        self._metrics, self._left, self.report = Metrics(), num_requests, {}

    def handle(self, source: Any, event: Any, now: float) -> Any:
        self._metrics.observe(now, source, event)
        return self._record(self._scheduler.handle(source, event, now), now)

    def tick(self, now: float) -> Any:
        return self._record(self._scheduler.tick(now), now)

    def _record(self, commands: Any, now: float) -> Any:
        for destination, command in commands:
            self._metrics.command(now, destination, command)
            over = isinstance(command, Rejected) or getattr(command, "finish_reason", None)
            self._left -= bool(over and isinstance(command, Emit | Rejected))
        if not self._left and not self.report:
            self.report = self._metrics.report(now)
        return commands


class AsMeasured(Simulation):
    """A simulation with measured block times, and workers that report like real ones."""

    block_bytes = 0

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._reported_s = dict.fromkeys(self.workers, 0.0)

    def start(self, ready_s: list[float]) -> None:
        """Start the workers at these times."""
        self._heap.clear()
        for worker, at_s in zip(self.workers.values(), ready_s, strict=True):
            self.at(at_s, partial(self._start, worker))

    def _block_s(self) -> float:
        return self.block_bytes / self.cost.link_Bps

    def _between_steps(self, worker: SimWorker) -> None:
        # Like the real loop: at the first step after 20 ms, or when idle.
        due = self.now - self._reported_s[worker.id] >= REPORT_EVERY_S
        self.report_share = 1.0 if due else 0.0
        if due:
            self._reported_s[worker.id] = self.now
        super()._between_steps(worker)


def arena(report: dict[str, Any]) -> tuple[ModelKv, int]:
    """Return the KV geometry of the one model, and the number of blocks per worker."""
    ((name, kv),) = report["worker_kv"]["models"].items()
    block_bytes = kv["block_bytes"]
    return (
        ModelKv(name, kv["block_size"], block_bytes),
        report["worker_kv"]["capacity_bytes"] // block_bytes,
    )


def simulated(
    report: dict[str, Any], requests: list[tuple[float, Request]], seed: int
) -> dict[str, Any]:
    """Simulate the requests on workers with the costs of the real ones. Returns the report."""
    config, (kv, num_blocks) = Config.from_dict(report["config"]), arena(report)
    cost = CostModel.fitted(report["costs"])
    spec = WorkerSpec(
        (kv,),
        num_blocks,
        config.batch,
        config.cache,
        cost.wake_s,
        SilentExecutor,
        cost.step_seconds,
    )
    rng = random.Random(seed)
    sim = AsMeasured([spec] * report["workers"], config.cluster, cost, Network(MESSAGE_S, rng), rng)
    sim.block_bytes, sim.max_events = kv.block_bytes, 10**9
    first_s = max(0.0, -min(report["ready_s"]))  # of the first request
    sim.start([first_s + ready_s for ready_s in report["ready_s"]])
    sim.scheduler = observed = Observed(sim.scheduler, len(requests))
    for at_s, request in requests:
        sim.submit(first_s + at_s, request)
    sim.run()
    return observed.report


def requests_of(workload: Workload, report: dict[str, Any]) -> Iterator[tuple[float, Request]]:
    """Return (seconds from the start, request) of the real run."""
    config, (kv, num_blocks) = Config.from_dict(report["config"]), arena(report)
    room = num_blocks * kv.block_size
    longest = min(room, config.model.max_model_len or room)
    model = ServedModel(name=config.model.name, max_model_len=longest, vocab_size=2, eos_ids=())
    job = ReplayJob(workload, (model,), seed=0)
    return zip(job.arrivals(), job.requests(), strict=False)
