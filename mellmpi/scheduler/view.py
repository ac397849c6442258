"""The input of a policy (numbers that it may not change) and its output, proposals."""

from dataclasses import dataclass, field

import numpy as np

from mellmpi.costs import AnswerLengths, CostModel
from mellmpi.protocol import ModelKv, Request, blocks_for
from mellmpi.scheduler.ledger import Ledger, WorkerState
from mellmpi.scheduler.size_classes import SizeClassCounts


@dataclass(frozen=True, slots=True)
class MoveProposal:
    """Propose to migrate this request to `dst`."""

    request_id: int
    dst: int
    reason: str
    mode: str | None = None  # "transfer", "recompute" or "split"; None: the cheapest
    bundle: int | None = None  # moves of a round with equal numbers count as one; None: alone


@dataclass(frozen=True, slots=True)
class Drain:
    """Propose to place nothing new on this worker, and to park it when it is empty."""

    worker: int


@dataclass(frozen=True, slots=True)
class ParkWorker:
    """Propose to park this worker, which holds no request."""

    worker: int


@dataclass(frozen=True, slots=True)
class WakeWorker:
    """Propose to make this worker, parked or draining, active again."""

    worker: int


Proposal = MoveProposal | Drain | ParkWorker | WakeWorker


class RequestColumns:
    """One row for each live request, in columns; rows are reused."""

    def __init__(self, capacity: int = 64):
        self.request_id = np.zeros(capacity, np.int64)
        self.live = np.zeros(capacity, bool)
        self.model = np.zeros(capacity, np.int64)  # index in Ledger.models
        self.worker = np.zeros(capacity, np.int64)  # 0: none
        self.movable = np.zeros(capacity, bool)  # in state RUNNING: owned, not migrating
        self.num_tokens = np.zeros(capacity, np.int64)  # prompt + output
        self.num_prompt = np.zeros(capacity, np.int64)
        self.pinned_to = np.zeros(capacity, np.int64)  # may resume on this worker only; 0: on any
        self.token_bytes = np.zeros(capacity, np.float64)  # KV of one position
        self.block_size = np.ones(capacity, np.int64)
        self.block_bytes = np.zeros(capacity, np.int64)
        self._free = list(range(capacity))[::-1]

    def _columns(self) -> list[str]:
        return [name for name, value in vars(self).items() if isinstance(value, np.ndarray)]

    def take(self) -> int:
        """Return a free row; all columns double when there is none."""
        if not self._free:
            n = len(self.live)
            for name in self._columns():
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
            self.block_size[n:] = 1
            self._free = list(range(n, 2 * n))[::-1]
        return self._free.pop()

    def add(self, request: Request, kv: ModelKv, model: int = 0) -> int:
        """Fill a row for a new request of the `model`-th model of the ledger; return the row."""
        row = self.take()
        self.model[row], self.pinned_to[row] = model, 0
        self.token_bytes[row] = kv.block_bytes / kv.block_size
        self.request_id[row], self.live[row] = request.id, True
        self.num_tokens[row] = self.num_prompt[row] = len(request.prompt)
        self.block_size[row], self.block_bytes[row] = kv.block_size, kv.block_bytes
        return row

    def drop(self, row: int) -> None:
        """Free the row."""
        self.live[row] = self.movable[row] = False
        self.worker[row] = 0
        self._free.append(row)

    def need(self, row: int) -> int:
        """Bytes of KV that this request occupies, in whole blocks."""
        blocks = blocks_for(int(self.num_tokens[row]), int(self.block_size[row]))
        return blocks * int(self.block_bytes[row])

    def kv_bytes(self, rows: np.ndarray) -> np.ndarray:
        """`need` of each row. int64 [n] -> int64 [n]."""
        blocks = -(-self.num_tokens[rows] // self.block_size[rows])
        return np.asarray(blocks * self.block_bytes[rows])


@dataclass(slots=True)
class View:
    """The cluster at one moment. Policies may only read it; columns change with every event."""

    now: float
    workers: Ledger
    requests: RequestColumns
    waiting_bytes: int  # KV bytes that the queue needs to be placed
    growth_Bps: np.ndarray  # float64 [workers + 1]: growth of KV on each worker, bytes a second
    token_rate: float  # output tokens a second of one request, moving average
    answer_tokens: float  # length of an output, moving average over finished requests
    park_after_s: float  # seconds after which an empty worker may be parked
    seed: int  # of --migrate stress
    period_s: float  # seconds since the last rebalancing round, bounded
    tick: int  # counts rebalancing rounds: with the seed, a policy's only source of randomness
    thrift: float = 0.5  # 0: move as few bytes as possible; 1: use as few workers as possible
    lengths: AnswerLengths = field(default_factory=AnswerLengths)  # of finished requests
    cost: CostModel = field(default_factory=CostModel)  # of steps, transfers and waking
    size_classes: SizeClassCounts | None = None  # created by a policy that needs it

    def active(self) -> np.ndarray:
        """bool [workers + 1]: may take requests."""
        return np.asarray(self.workers.state == WorkerState.ACTIVE)

    def hosting(self, model: str) -> np.ndarray:
        """bool [workers + 1]: active and able to run `model`."""
        return self.workers.hosting(model)
