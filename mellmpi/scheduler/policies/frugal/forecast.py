"""What `frugal` expects of each worker: free memory, growth, and requests that end."""

from dataclasses import dataclass

import numpy as np

from mellmpi.scheduler.policies.base import group_by_worker
from mellmpi.scheduler.view import View

MAX_TIME_SCALE = 4.0  # thrift 0 multiplies all times by this, thrift 1 divides them by it
# The placement cost (see `frugal.policy`), at thrift 0.5:
OVERFLOW_WEIGHT = 2.0  # cost of a worker that overflows now; an almost empty one costs 1
OVERFLOW_DECAY_S = 5.5  # an overflow this far away costs 1/e of that
IDLE_DECAY_S = 8.5  # free memory for this many seconds of growth costs 1 - 1/e
END_WEIGHT = 2.0  # weight of λ, the rate at which requests end
MOVE_PRICE = 1.7  # cost of moving as many bytes as a worker holds, where answers take long
SHORT_ANSWER_S = 1.0  # answers of this duration double the price of a move
MIN_OVERFLOW_S = 0.5  # least time to overflow after a placement
LEAD_ROUNDS = 1.05  # relief starts this many rounds, and a transfer, before the overflow


def cost_params(view: View) -> tuple[float, float, float]:
    """`params` of the kernels."""
    scale = time_scale(view)
    return OVERFLOW_WEIGHT, 1 / (scale * OVERFLOW_DECAY_S), 1 / (scale * IDLE_DECAY_S)


def time_scale(view: View) -> float:
    """The factor of `--thrift` on all times."""
    return float(MAX_TIME_SCALE ** (1 - 2 * view.thrift))


def min_overflow_s(view: View) -> float:
    """Least time to overflow after a placement: long enough for a relief."""
    relief_s = LEAD_ROUNDS * view.period_s + view.cost.link_latency_s
    return max(time_scale(view) * MIN_OVERFLOW_S, relief_s)


def request_end_rate(view: View) -> float:
    """Ends a second that one request adds to its worker, weighted by `END_WEIGHT`."""
    return END_WEIGHT / answer_s(view)


def answer_s(view: View) -> float:
    """Mean seconds of the answers that ended last; inf while the token rate is unknown."""
    tokens = max(view.lengths.mean_output(view.answer_tokens), 1.0)
    return tokens / view.token_rate if view.token_rate > 0 else np.inf


def move_price(view: View, worker: int) -> float:
    """Placement cost of each byte moved away from this worker; higher where answers are short."""
    price = MOVE_PRICE * (1 + SHORT_ANSWER_S / answer_s(view))
    return price / float(view.workers.capacity[worker])


def growth_Bps(view: View) -> np.ndarray:
    """float64 [workers + 1]: bytes a second by which each worker's requests grow.

    The measured growth lags behind moves; it is used only while the token rate is unknown.
    """
    if view.token_rate <= 0:
        return view.growth_Bps
    workers = view.workers
    return np.asarray(workers.num_requests * workers.token_bytes * view.token_rate)


def half_block(view: View) -> np.ndarray:
    """float64 [workers + 1]: mean bytes free in the last block of a request."""
    workers = view.workers
    return np.where(workers.block_bytes <= workers.token_bytes, 0.0, workers.block_bytes / 2)


@dataclass
class CapacityForecast:
    """The workers as they will be after the moves decided so far in this round."""

    free: np.ndarray  # float64 [workers + 1], bytes
    growth: np.ndarray  # float64 [workers + 1], bytes a second
    end_rate: np.ndarray  # float64 [workers + 1], ends a second, weighted
    slots: np.ndarray  # int64 [workers + 1]: requests that can still be added
    accepts: np.ndarray  # bool [workers + 1]: may be a destination
    is_source: np.ndarray  # bool [workers + 1]: a request moves away in this round
    rows: np.ndarray  # live rows that have a worker, sorted by worker
    first: np.ndarray  # int64 [workers + 2]: rows[first[w] : first[w + 1]] are on worker w
    request_end_rate: float  # share of one request in `end_rate`

    @staticmethod
    def of(view: View) -> "CapacityForecast":
        """The forecast before any move."""
        workers, requests = view.workers, view.requests
        rows, first = group_by_worker(view, np.flatnonzero(requests.live & (requests.worker > 0)))
        return CapacityForecast(
            free=workers.budget - workers.num_requests * half_block(view),
            growth=growth_Bps(view).copy(),
            end_rate=workers.num_requests * request_end_rate(view),
            slots=workers.max_requests - workers.num_requests,
            accepts=view.active() & (workers.num_returning == 0),
            is_source=np.zeros(len(workers.state), bool),
            rows=rows,
            first=first,
            request_end_rate=request_end_rate(view),
        )

    def copy(self) -> "CapacityForecast":
        """A copy for trial moves; `rows` and `first` are shared."""
        return CapacityForecast(
            self.free.copy(),
            self.growth.copy(),
            self.end_rate.copy(),
            self.slots.copy(),
            self.accepts.copy(),
            self.is_source.copy(),
            self.rows,
            self.first,
            self.request_end_rate,
        )

    def busy_destinations(self, view: View) -> np.ndarray:
        """bool [workers + 1]: holds requests and may receive another one."""
        return self.accepts & (view.workers.num_requests > 0) & (self.slots > 0)

    def rows_on(self, worker: int) -> np.ndarray:
        """Rows of the requests on a worker."""
        return self.rows[self.first[worker] : self.first[worker + 1]]

    def movable_rows(self, view: View, worker: int) -> np.ndarray | None:
        """Rows of all requests on a worker; None if there are none, or if one of them migrates."""
        rows = self.rows_on(worker)
        complete = len(rows) == view.workers.num_requests[worker]
        return rows if complete and len(rows) and view.requests.movable[rows].all() else None

    def record_move(self, size: float, growth: float, src: int, dst: int) -> None:
        """Apply a move of `size` bytes. The source's bytes stay in use until the move is done."""
        self.free[dst] -= size
        self.growth[dst] += growth
        self.end_rate[dst] += self.request_end_rate
        self.slots[dst] -= 1
        self.growth[src] -= growth
        self.end_rate[src] -= self.request_end_rate
        self.is_source[src] = True


def request_columns(view: View, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes, bytes a second, model) of these requests: float64, float64, int64 [rows].

    Bytes include half a block to grow into, as `CapacityForecast.free` does.
    """
    requests = view.requests
    block = np.where(requests.block_size[rows] > 1, requests.block_bytes[rows], 0)
    return (
        requests.kv_bytes(rows) + block / 2,
        requests.token_bytes[rows] * view.token_rate,
        requests.model[rows],
    )
