"""What `frugal` sees: for every worker its room, its growth, and how soon somebody leaves it."""

from dataclasses import dataclass

import numpy as np

from mellmpi.scheduler.policies.base import by_worker
from mellmpi.scheduler.view import View

SPREAD = 4.0  # thrift 0 keeps so many times as much time, thrift 1 so many times less
# The strain of a worker, see `kernels.strain`. At the middle of `thrift`:
URGENCY = 2.0  # of one that overflows now, against 1 for one that is almost empty
URGENT_S = 5.5  # an overflow so far away counts 1/e of that
IDLE_S = 8.5  # room for so many seconds of growth counts 1 - 1/e
LEAVING = 2.0  # an end of a request is worth so many times its mean rate
PRICE = 1.7  # strain, for moving as much as a worker can hold, of answers that last long;
PAID_S = 1.0  # of those that last so many seconds, twice as much
LEAST_S = 0.5  # nothing is put where it leaves less time to overflow
LEAD_TICKS = 1.05  # relief comes so many rounds before the overflow, and what a transfer takes


def strain_of(view: View) -> tuple[float, float, float]:
    """`par` of the kernels."""
    return URGENCY, 1 / (scale(view) * URGENT_S), 1 / (scale(view) * IDLE_S)


def scale(view: View) -> float:
    """What all times that are kept are multiplied with."""
    return float(SPREAD ** (1 - 2 * view.thrift))


def least_s(view: View) -> float:
    """Time to overflow that is left where something is put: at least till relief can come."""
    return max(scale(view) * LEAST_S, LEAD_TICKS * view.period_s + view.cost.link_latency_s)


def leaves(view: View) -> float:
    """Ends a second that a request adds to its worker, by the mean of those that ended lately."""
    return LEAVING / answer_s(view)


def answer_s(view: View) -> float:
    """Seconds that an answer takes, by the mean of those that ended lately; inf: not known yet."""
    tokens = max(view.lengths.mean_output(view.answer_tokens), 1.0)
    return tokens / view.token_rate if view.token_rate > 0 else np.inf


def price(view: View, worker: int) -> float:
    """Strain a byte that leaves this worker: what ends soon is hardly worth moving."""
    return PRICE * (1 + PAID_S / answer_s(view)) / float(view.workers.capacity[worker])


def growth_Bps(view: View) -> np.ndarray:
    """float64 [workers + 1]: bytes a second by which each worker's requests grow.

    What was measured lags behind moves: it is used only until the rate of a request is known.
    """
    if view.token_rate <= 0:
        return view.growth_Bps
    workers = view.workers
    return np.asarray(workers.num_requests * workers.token_bytes * view.token_rate)


def half_block(view: View) -> np.ndarray:
    """float64 [workers + 1]: bytes a request lacks to whole blocks, on average."""
    workers = view.workers
    return np.where(workers.block_bytes <= workers.token_bytes, 0.0, workers.block_bytes / 2)


@dataclass
class CapacityForecast:
    """What this round has left to give, and who is where."""

    room: np.ndarray  # float64 [workers + 1], bytes; less with every move
    growth: np.ndarray  # float64 [workers + 1], bytes a second
    leaving: np.ndarray  # float64 [workers + 1], ends a second, weighed
    seats: np.ndarray  # int64 [workers + 1]
    takes: np.ndarray  # bool [workers + 1]: may be given something
    gave: np.ndarray  # bool [workers + 1]: something is to leave it
    rows: np.ndarray  # live rows that have a worker, in its order
    first: np.ndarray  # int64 [workers + 2]: rows[first[w] : first[w + 1]] are on worker w
    leaves: float  # what one request adds to `leaving`

    @staticmethod
    def of(view: View) -> "CapacityForecast":
        workers, requests = view.workers, view.requests
        rows, first = by_worker(view, np.flatnonzero(requests.live & (requests.worker > 0)))
        return CapacityForecast(
            room=workers.budget - workers.num_requests * half_block(view),
            growth=growth_Bps(view).copy(),
            leaving=workers.num_requests * leaves(view),
            seats=workers.max_requests - workers.num_requests,
            takes=view.active() & (workers.num_returning == 0),
            gave=np.zeros(len(workers.state), bool),
            rows=rows,
            first=first,
            leaves=leaves(view),
        )

    def copy(self) -> "CapacityForecast":
        """For a trial: who is where is the same, what there is to give is its own."""
        return CapacityForecast(
            self.room.copy(),
            self.growth.copy(),
            self.leaving.copy(),
            self.seats.copy(),
            self.takes.copy(),
            self.gave.copy(),
            self.rows,
            self.first,
            self.leaves,
        )

    def accepting(self, view: View) -> np.ndarray:
        """bool [workers + 1]: holds something, and may be given more."""
        return self.takes & (view.workers.num_requests > 0) & (self.seats > 0)

    def on(self, worker: int) -> np.ndarray:
        return self.rows[self.first[worker] : self.first[worker + 1]]

    def settled(self, view: View, worker: int) -> np.ndarray | None:
        """All rows on it; None where something is on its way to it or from it."""
        rows = self.on(worker)
        whole = len(rows) == view.workers.num_requests[worker]
        return rows if whole and len(rows) and view.requests.movable[rows].all() else None

    def give(self, size: float, grow: float, src: int, dst: int) -> None:
        """A move is decided. What the source gets back is free only when it has happened."""
        self.room[dst] -= size
        self.growth[dst] += grow
        self.leaving[dst] += self.leaves
        self.seats[dst] -= 1
        self.growth[src] -= grow
        self.leaving[src] -= self.leaves
        self.gave[src] = True


def sizes(view: View, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes, bytes a second, model) of these requests: float64, float64, int64 [rows].

    Bytes with half a block of what they grow by, as in a worker's `room`.
    """
    requests = view.requests
    block = np.where(requests.block_size[rows] > 1, requests.block_bytes[rows], 0)
    return (
        requests.kv_bytes(rows) + block / 2,
        requests.token_bytes[rows] * view.token_rate,
        requests.model[rows],
    )
