"""The workers as rank 0 knows them: last report, less what was ordered and not yet acknowledged.

Columns, so that a policy decides with a few numpy operations. Worker w is row w; row 0, the
scheduler itself, is never active.
"""

from collections import deque
from enum import IntEnum

import numpy as np

from mellmpi.protocol import ModelKv


class WorkerState(IntEnum):
    """In this order: from DRAINING to WAKING it can become active again."""

    STARTING = 0
    ACTIVE = 1
    DRAINING = 2  # active, but is being emptied: takes nothing new while others have room
    PARKING = 3
    PARKED = 4
    WAKING = 5
    LOST = 6


# Python 3.11 looks members up slowly, and numpy compares them slowly: plain numbers for every step.
ACTIVE, LOST = int(WorkerState.ACTIVE), int(WorkerState.LOST)
WITHOUT_ARENA = frozenset((int(WorkerState.PARKED), int(WorkerState.WAKING)))


class Ledger:
    """Budget = free bytes as last reported - bytes ordered and not yet acknowledged."""

    def __init__(self, num_workers: int):
        rows = num_workers + 1
        self.state = np.zeros(rows, np.int8)  # changed by `enter` only
        self.capacity = np.zeros(rows, np.int64)  # bytes of the KV arena
        self.free = np.zeros(rows, np.int64)  # bytes, as last reported
        self.ordered = np.zeros(rows, np.int64)  # bytes in unacknowledged orders
        self.num_requests = np.zeros(rows, np.int64)  # owned, or on their way here
        self.max_requests = np.zeros(rows, np.int64)
        self.num_returning = np.zeros(rows, np.int64)  # preempted, and to resume here alone
        self.empty_since_s = np.zeros(rows, np.float64)  # valid while num_requests == 0
        self.block_bytes = np.zeros(rows, np.int64)  # of the largest block of its models
        self.token_bytes = np.zeros(rows, np.float64)  # KV of one position, the largest likewise
        self.activated = np.zeros(rows, np.int64)  # the higher, the later it got its first request
        self.models: list[str] = []  # all that any worker has said it runs
        self.runs = np.zeros((0, rows), bool)  # [model, worker]: has said that it runs it
        self._able: dict[str, np.ndarray] = {}  # by model: the rows of `runs`
        self._hosting: dict[str, np.ndarray] = {}  # by model; forgotten when a state changes
        self._nobody = np.zeros(rows, bool)
        self._sent = [0] * rows  # commands
        self._unacked: list[deque[tuple[int, int]]] = [deque() for _ in range(rows)]

    @property
    def budget(self) -> np.ndarray:
        """int64 [workers + 1], bytes."""
        return self.free - self.ordered

    def room(self, worker: int) -> int:
        """Bytes: the budget of one worker."""
        return int(self.free[worker] - self.ordered[worker])

    def able(self, model: str) -> np.ndarray:
        """bool [workers + 1]: has said that it runs `model`, whatever its state is now."""
        return self._able.get(model, self._nobody)

    def hosting(self, model: str) -> np.ndarray:
        """bool [workers + 1]: takes new requests of `model`. Do not write it.

        That is: active, able to run it, and with nobody who waits to resume there.
        """
        if (hosting := self._hosting.get(model)) is None:
            takes = (self.state == WorkerState.ACTIVE) & (self.num_returning == 0)
            hosting = self.able(model) & takes
            self._hosting[model] = hosting
        return hosting

    def enter(self, worker: int, state: WorkerState) -> None:
        """The worker is in this state from here on."""
        self.state[worker] = state
        self._hosting.clear()

    def workers(self, state: WorkerState) -> list[int]:
        """Ids of the workers in this state, ascending."""
        return [w for w in np.flatnonzero(self.state == state).tolist() if w]

    def order(self, worker: int, num_bytes: int) -> None:
        """One more command went out; it will take `num_bytes` of the arena (0: none)."""
        self._sent[worker] += 1
        self._unacked[worker].append((self._sent[worker], num_bytes))
        self.ordered[worker] += num_bytes

    def report(self, worker: int, acked: int, free_bytes: int) -> None:
        """The worker has handled `acked` commands and has `free_bytes` since."""
        assert acked <= self._sent[worker], f"worker {worker} acknowledged what was never sent"
        self.free[worker] = free_bytes
        unacked = self._unacked[worker]
        while unacked and unacked[0][0] <= acked:
            self.ordered[worker] -= unacked.popleft()[1]

    def report_all(self, workers: np.ndarray, acked: list[int], free_bytes: np.ndarray) -> None:
        """As `report` of each. int64 [workers], by place in `workers`."""
        for i, worker in enumerate(workers.tolist()):
            if self._unacked[worker]:
                self.report(worker, acked[i], 0)
        self.free[workers] = free_bytes

    def ready(
        self,
        worker: int,
        models: tuple[ModelKv, ...],
        capacity_bytes: int,
        max_requests: int,
        acked: int,
    ) -> None:
        """A worker has loaded its models and holds no request."""
        for m in models:
            self._know(m.model)
            self._able[m.model][worker] = True
        self.block_bytes[worker] = max(m.block_bytes for m in models)
        self.token_bytes[worker] = max(m.block_bytes / m.block_size for m in models)
        self.capacity[worker], self.max_requests[worker] = capacity_bytes, max_requests
        self.enter(worker, WorkerState.ACTIVE)
        self.report(worker, acked, capacity_bytes)

    def _know(self, model: str) -> None:
        if model not in self._able:
            self.models.append(model)
            self.runs = np.concatenate([self.runs, self._nobody[None]])
            self._able = dict(zip(self.models, self.runs, strict=True))

    def gone(self, worker: int, state: WorkerState) -> None:
        """It has no arena any more: parked or lost."""
        self.enter(worker, state)
        self.free[worker] = self.ordered[worker] = 0
        self._unacked[worker].clear()

    def add(self, worker: int) -> None:
        if not self.num_requests[worker]:
            self.activated[worker] = self.activated.max() + 1
        self.num_requests[worker] += 1

    def expect(self, worker: int, change: int) -> None:
        """So many more (or fewer) requests wait to resume there."""
        self.num_returning[worker] += change
        self._hosting.clear()

    def remove(self, worker: int, now: float) -> None:
        self.num_requests[worker] -= 1
        if not self.num_requests[worker]:
            self.empty_since_s[worker] = now
