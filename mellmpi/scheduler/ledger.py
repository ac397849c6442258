"""State and free memory of every worker, as far as rank 0 knows.

Columns, so that a policy decides with a few numpy operations. Worker w is row w; row 0, the
scheduler itself, is never active.
"""

from collections import deque
from enum import IntEnum

import numpy as np

from mellmpi.protocol import ModelKv


class WorkerState(IntEnum):
    """Ordered: workers from DRAINING to WAKING can become active again.

    A worker that an operator has drained is held: only the operator makes it active again.
    """

    STARTING = 0
    ACTIVE = 1
    DRAINING = 2  # runs its requests, takes new ones only when no active worker has room
    PARKING = 3
    PARKED = 4
    WAKING = 5
    LOST = 6
    HELD = 7  # held: runs its requests until they have moved away, takes none
    HELD_PARKED = 8  # held and parked


# Plain numbers for the hot path: enum lookup (Python 3.11) and comparison with numpy are slow.
ACTIVE, LOST = int(WorkerState.ACTIVE), int(WorkerState.LOST)
WITHOUT_ARENA = frozenset(
    (int(WorkerState.PARKED), int(WorkerState.WAKING), int(WorkerState.HELD_PARKED))
)


class Ledger:
    """Budget = free bytes in the last report - bytes of commands not acknowledged by it."""

    def __init__(self, num_workers: int):
        rows = num_workers + 1
        self.state = np.zeros(rows, np.int8)  # changed by `enter` only
        self.held = np.zeros(rows, bool)  # drained by an operator; also in states not named so
        self.capacity = np.zeros(rows, np.int64)  # bytes of the KV arena
        self.free = np.zeros(rows, np.int64)  # bytes, as last reported
        self.ordered = np.zeros(rows, np.int64)  # bytes of unacknowledged commands
        self.num_requests = np.zeros(rows, np.int64)  # owned, or migrating to it
        self.max_requests = np.zeros(rows, np.int64)
        self.num_returning = np.zeros(rows, np.int64)  # preempted, pinned to it
        self.empty_since_s = np.zeros(rows, np.float64)  # valid while num_requests == 0
        self.block_bytes = np.zeros(rows, np.int64)  # of the largest block of its models
        self.token_bytes = np.zeros(rows, np.float64)  # KV of one position, the largest
        self.activated = np.zeros(rows, np.int64)  # order in which workers got their first request
        self.models: list[str] = []  # of all workers so far
        self.runs = np.zeros((0, rows), bool)  # [model, worker]: the worker hosts the model
        self._able: dict[str, np.ndarray] = {}  # by model: the rows of `runs`
        self._hosting: dict[str, np.ndarray] = {}  # by model: cache, cleared when a state changes
        self._none = np.zeros(rows, bool)
        self._sent = [0] * rows  # commands
        self._unacked: list[deque[tuple[int, int]]] = [deque() for _ in range(rows)]

    @property
    def budget(self) -> np.ndarray:
        """int64 [workers + 1]: bytes."""
        return self.free - self.ordered

    def room(self, worker: int) -> int:
        """The budget of one worker, bytes."""
        return int(self.free[worker] - self.ordered[worker])

    def able(self, model: str) -> np.ndarray:
        """bool [workers + 1]: hosts `model` when loaded, whatever its state is now."""
        return self._able.get(model, self._none)

    def hosting(self, model: str) -> np.ndarray:
        """bool [workers + 1], read-only: takes new requests of `model`.

        Such a worker is active, hosts the model, and has no preempted request pinned to it.
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
        """Count one more command, which will take `num_bytes` of the arena (0: none)."""
        self._sent[worker] += 1
        self._unacked[worker].append((self._sent[worker], num_bytes))
        self.ordered[worker] += num_bytes

    def report(self, worker: int, acked: int, free_bytes: int) -> None:
        """Take in a report: `acked` commands handled so far, after which `free_bytes` are free."""
        assert acked <= self._sent[worker], f"worker {worker} acknowledged what was never sent"
        self.free[worker] = free_bytes
        unacked = self._unacked[worker]
        while unacked and unacked[0][0] <= acked:
            self.ordered[worker] -= unacked.popleft()[1]

    def report_all(self, workers: np.ndarray, acked: list[int], free_bytes: np.ndarray) -> None:
        """`report` for several workers. All arguments [workers], in the order of `workers`."""
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
        """Make a worker active that has loaded its models and holds no request."""
        for m in models:
            self._add_model(m.model)
            self._able[m.model][worker] = True
        self.block_bytes[worker] = max(m.block_bytes for m in models)
        self.token_bytes[worker] = max(m.block_bytes / m.block_size for m in models)
        self.capacity[worker], self.max_requests[worker] = capacity_bytes, max_requests
        self.enter(worker, WorkerState.ACTIVE)
        self.report(worker, acked, capacity_bytes)

    def _add_model(self, model: str) -> None:
        if model not in self._able:
            self.models.append(model)
            self.runs = np.concatenate([self.runs, self._none[None]])
            self._able = dict(zip(self.models, self.runs, strict=True))

    def drop_arena(self, worker: int, state: WorkerState) -> None:
        """Make a worker parked or lost: its arena no longer exists."""
        self.enter(worker, state)
        self.free[worker] = self.ordered[worker] = 0
        self._unacked[worker].clear()

    def add(self, worker: int) -> None:
        """Count a request that the worker owns or reserves room for."""
        if not self.num_requests[worker]:
            self.activated[worker] = self.activated.max() + 1
        self.num_requests[worker] += 1

    def add_returning(self, worker: int, change: int) -> None:
        """Change the number of preempted requests pinned to the worker."""
        self.num_returning[worker] += change
        self._hosting.clear()

    def remove(self, worker: int, now: float) -> None:
        """Undo `add`; `now` in seconds."""
        self.num_requests[worker] -= 1
        if not self.num_requests[worker]:
            self.empty_since_s[worker] = now
