"""The workers' side of rank 0: their states, their budgets, what is on its way to them."""

from typing import Any

import numpy as np

from mellmpi.config import ClusterConfig
from mellmpi.core.cost import CostModel
from mellmpi.core.ledger import Ledger, WorkerState
from mellmpi.core.view import RequestColumns, View
from mellmpi.protocol import (
    OBSERVER,
    Address,
    ModelKv,
    Park,
    Parked,
    StepReport,
    Wake,
    WorkerChanged,
    WorkerReady,
)

Commands = list[tuple[Address, Any]]
RATE_BLEND = 0.3  # weight of the newest interval in a rate


class Fleet:
    """All workers. Commands gather in `out` until the cluster scheduler hands them on."""

    def __init__(self, num_workers: int, config: ClusterConfig):
        self.ledger = Ledger(num_workers)
        self.cost = CostModel()
        self.models: dict[str, ModelKv] = {}
        self.out: Commands = []
        self._decoded = np.zeros(num_workers + 1)  # tokens since the last tick
        self._ticked_s = 0.0
        self.view = View(
            now=0.0, workers=self.ledger, requests=RequestColumns(), waiting_bytes=0,
            growth_Bps=np.zeros(num_workers + 1), token_rate=0.0, horizon_s=config.horizon_s,
            park_after_s=config.park_after_s, seed=config.seed, tick=0,
        )  # fmt: skip

    def take(self) -> Commands:
        """The commands gathered since the last call."""
        commands, self.out = self.out, []
        return commands

    def send(self, worker: int, command: Any, num_bytes: int = 0) -> None:
        """Order something of a worker; it will take `num_bytes` of its arena."""
        if self.ledger.state[worker] != WorkerState.LOST:
            self.ledger.order(worker, num_bytes)
            self.out.append((worker, command))

    # --- states ---------------------------------------------------------------------------------

    def ready(self, worker: int, event: WorkerReady) -> None:
        self.ledger.ready(
            worker, event.models, event.capacity_bytes, event.max_num_seqs, event.acked
        )
        self.ledger.empty_since_s[worker] = self.view.now
        self.models |= {m.model: m for m in event.models}
        self._changed(worker)

    def change(self, worker: int, state: WorkerState) -> None:
        self.ledger.state[worker] = state
        self._changed(worker)

    def _changed(self, worker: int) -> None:
        name = WorkerState(int(self.ledger.state[worker])).name.lower()
        self.out.append((OBSERVER, WorkerChanged(worker, name)))

    def park(self, worker: int) -> None:
        """Tell an empty worker to give its arena back; nothing if it is not empty or not active."""
        idle = not self.ledger.num_requests[worker]
        if idle and self.ledger.state[worker] in (WorkerState.ACTIVE, WorkerState.DRAINING):
            self.send(worker, Park())
            self.change(worker, WorkerState.PARKING)

    def parked(self, worker: int, event: Parked) -> None:
        self.ledger.report(worker, event.acked, 0)
        self.ledger.gone(worker, WorkerState.PARKED)
        self._changed(worker)

    def wake(self, worker: int) -> None:
        if self.ledger.state[worker] == WorkerState.PARKED:
            self.send(worker, Wake())
            self.change(worker, WorkerState.WAKING)

    def lost(self, worker: int) -> None:
        self.ledger.gone(worker, WorkerState.LOST)
        self._changed(worker)

    def any_left(self) -> bool:
        """Is there a worker that is not lost?"""
        return bool((self.ledger.state[1:] != WorkerState.LOST).any())

    def undrain(self) -> bool:
        """Let draining workers take requests again; True if there was one."""
        draining = self.ledger.workers(WorkerState.DRAINING)
        for worker in draining:
            self.change(worker, WorkerState.ACTIVE)
        return bool(draining)

    def wake_for(self, waiting_bytes: int) -> None:
        """Wake one worker more, unless those that are waking already have room for the queue."""
        coming = self.ledger.workers(WorkerState.WAKING, WorkerState.STARTING)
        parked = self.ledger.workers(WorkerState.PARKED)
        if parked and waiting_bytes > self.ledger.capacity[coming].sum():
            self.wake(parked[0])

    def largest_capacity(self) -> int:
        """Bytes of the largest arena that is not lost."""
        there = self.ledger.state != WorkerState.LOST
        return int(self.ledger.capacity[there].max(initial=0))

    # --- rates ----------------------------------------------------------------------------------

    def report(self, worker: int, event: StepReport) -> None:
        if self.ledger.state[worker] == WorkerState.PARKED:
            return  # written before it parked: there is no arena any more
        self.ledger.report(worker, event.acked, event.free_bytes)
        self.cost = self.cost.after_steps(event)
        self._decoded[worker] += event.decode_tokens

    def tick(self, now: float) -> None:
        """Turn what was decoded since the last tick into rates."""
        elapsed, self._ticked_s = now - self._ticked_s, now
        rates = self._decoded / max(elapsed, 1e-9)
        token_bytes = max((m.block_bytes / m.block_size for m in self.models.values()), default=0)
        growth = self.view.growth_Bps
        growth += RATE_BLEND * (rates * token_bytes - growth)
        running = int(self.ledger.num_requests.sum())
        if running:
            per_request = float(rates.sum()) / running
            self.view.token_rate += RATE_BLEND * (per_request - self.view.token_rate)
        self._decoded[:] = 0
        self.view.tick += 1
