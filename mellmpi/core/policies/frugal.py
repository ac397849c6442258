"""Frugal: as few workers as hold the load, with room for it to grow.

What is scarce is time to overflow: the room of a worker over the growth of its requests.

- An arrival goes to the worker that it leaves the least time, but not less than a second or so.
- A worker about to overflow gives away the request that helps longest for its bytes, to the
  place that it fits most tightly; the larger the hole it leaves, the later the next one follows.
- Workers are emptied, those that hold least first, as long as what they hold fits elsewhere.

`View.thrift` scales how much time is kept: less time, fewer workers, more moves. The constants
were chosen on all public traces at once; docs/policies.md has the frontier.
"""

from dataclasses import dataclass

import numpy as np

from mellmpi.core.ledger import WorkerState
from mellmpi.core.policies.base import by_worker, idle_workers, more_workers, room_after
from mellmpi.core.policies.kernels import emptied, relief, tightest
from mellmpi.core.view import Drain, Move, Proposal, View, WakeWorker

# Seconds of growth that are kept free at the middle of `thrift`:
ARRIVAL_S = 1.35  # where an arrival is placed
RELIEF_S = 5.3  # where an overflow goes to
LAST_S = 0.75  # likewise, if there is no such place
DRAIN_S = 1.8  # where what is drained goes to
SPREAD = 4.0  # thrift 0 keeps so many times as much, thrift 1 so many times less
# What a relief is worth: its gain in [0, 1], against bytes (of a whole worker) and room left over.
RELIEF_WORTH = (3.7, 0.67, 1.87, 15.0)  # theta_s, price of bytes, price of room, its scale in s
OPENING_SHARE = 0.33  # a new worker takes over the largest request up to this share of a worker
LEAD_TICKS = 1.2  # relief comes so many rounds before the overflow, and what a transfer takes
DRAIN_TRIES = 2  # workers that cannot be emptied before the round gives up


def place(view: View, row: int, model: str) -> int | None:
    """The worker it fits most tightly with room to grow, while others can be woken.

    Where every worker is active already, what overflows can only be preempted: then the queue
    waits, rather than fill the last room of those that run.
    """
    room = room_after(view, row, model)
    workers, seats = view.workers, room >= 0
    grows = view.token_rate * float(view.requests.token_bytes[row])
    keep = half_blocks(view)
    if not more_workers(view, model):
        keep = np.maximum(keep, _answers_room(view))
    may = seats & (workers.num_requests > 0)
    spare = (room - keep).astype(float)
    worker = int(tightest(spare, growth_Bps(view), may, 0.0, grows, _scale(view) * ARRIVAL_S))
    if worker:
        return worker
    worker = int(np.argmax(np.where(workers.num_requests == 0, room, -1)))
    alone = not workers.num_requests[worker]  # an empty worker is all the room there is
    return worker if room[worker] >= 0 and alone else None


def rebalance(view: View) -> list[Proposal]:
    """Avert overflow and empty what can be emptied; if there is neither, park the empty ones."""
    fleet = _Fleet.of(view)
    proposals, lacking = _relieve(view, fleet)
    if lacking:
        proposals += _one_worker_more(view)
    proposals += _go_on_draining(view, fleet) or _drain(view, fleet)
    return proposals if proposals or lacking else idle_workers(view)


def growth_Bps(view: View) -> np.ndarray:
    """float64 [workers + 1]: bytes a second by which each worker's requests grow."""
    expected = view.workers.num_requests * view.workers.token_bytes * view.token_rate
    return np.asarray(np.maximum(expected, view.growth_Bps))


def half_blocks(view: View) -> np.ndarray:
    """int64 [workers + 1]: half a block a request: what is missing to whole blocks, on average."""
    one_token = view.workers.block_bytes <= view.workers.token_bytes
    return np.where(one_token, 0, view.workers.num_requests * view.workers.block_bytes // 2)


def _scale(view: View) -> float:
    return float(SPREAD ** (1 - 2 * view.thrift))


def _answers_room(view: View) -> np.ndarray:
    """int64 [workers + 1]: bytes for half an answer of every request, what is left on average."""
    workers = view.workers
    return np.asarray(
        (workers.num_requests * workers.token_bytes * (view.answer_tokens / 2)).astype(np.int64)
    )


@dataclass
class _Fleet:
    """What this round has left to give, and who is where."""

    room: np.ndarray  # float64 [workers + 1], bytes; less with every move
    growth: np.ndarray  # float64 [workers + 1], bytes a second
    seats: np.ndarray  # int64 [workers + 1]
    takes: np.ndarray  # bool [workers + 1]: may be given something
    rows: np.ndarray  # live rows that have a worker, in its order
    first: np.ndarray  # int64 [workers + 2]: rows[first[w] : first[w + 1]] are on worker w

    @staticmethod
    def of(view: View) -> "_Fleet":
        workers, requests = view.workers, view.requests
        placed = np.flatnonzero(requests.live & (requests.worker > 0))
        rows, first = by_worker(view, placed)
        return _Fleet(
            room=(workers.budget - half_blocks(view)).astype(float), growth=growth_Bps(view),
            seats=workers.max_requests - workers.num_requests,
            takes=view.active() & (workers.num_returning == 0), rows=rows, first=first,
        )  # fmt: skip

    def copy(self) -> "_Fleet":
        """For a trial: who is where is the same, what there is to give is its own."""
        return _Fleet(self.room.copy(), self.growth.copy(), self.seats.copy(), self.takes.copy(),
                      self.rows, self.first)  # fmt: skip

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
        self.seats[dst] -= 1
        self.growth[src] -= grow


def _sizes(view: View, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(bytes, bytes a second, bool [rows, workers + 1] who runs its model) of these requests."""
    requests = view.requests
    hosts = np.ascontiguousarray(view.workers.runs[requests.model[rows]])
    return (
        requests.kv_bytes(rows).astype(float),
        requests.token_bytes[rows] * view.token_rate,
        hosts,
    )


# --- overflow ------------------------------------------------------------------------------------


def _relieve(view: View, fleet: _Fleet) -> tuple[list[Proposal], bool]:
    """Moves away from workers that overflow before the next round and a transfer are over.

    And whether a worker that will overflow later, but sooner than one can be woken, has no place
    to give anything to.
    """
    mean_bytes = int(view.requests.kv_bytes(fleet.rows).mean()) if len(fleet.rows) else 0
    lead_s = LEAD_TICKS * view.period_s + view.cost.transfer_s(mean_bytes)
    wake_s = lead_s + view.period_s + view.cost.wake_s
    crowded = np.flatnonzero((fleet.room < wake_s * fleet.growth) & (view.workers.num_requests > 1))
    soon = fleet.room[crowded] < lead_s * fleet.growth[crowded]
    proposals: list[Proposal] = []
    lacking, scale = False, _scale(view)
    for worker in crowded[soon].tolist():
        if (rows := fleet.settled(view, worker)) is None:
            continue  # what is here has yet to arrive, or help is on its way
        found = (
            _best_relief(view, fleet, worker, rows, (scale * RELIEF_S, scale * LAST_S))
            or _opening(view, fleet, worker, rows)
            or _best_relief(view, fleet, worker, rows, (lead_s,))
        )
        lacking |= found is None
        proposals += [_moved(view, fleet, worker, *found)] if found else []
    lacking = lacking or _will_lack(view, fleet.copy(), crowded[~soon].tolist())
    return proposals, lacking


def _will_lack(view: View, fleet: _Fleet, workers: list[int]) -> bool:
    """Is there, for one of these, no good place left once the others have theirs?"""
    keep = (_scale(view) * LAST_S,)
    for worker in workers:
        if (rows := fleet.settled(view, worker)) is not None:
            if (found := _best_relief(view, fleet, worker, rows, keep)) is None:
                return True
            _moved(view, fleet, worker, *found)
    return False


def _best_relief(view: View, fleet: _Fleet, worker: int,
                 rows: np.ndarray, keeps_s: tuple[float, ...],
                 ) -> tuple[int, int] | None:  # fmt: skip
    """(row, destination) that helps most; of `keeps_s`, the first that some place can keep."""
    size, grow, hosts = _sizes(view, rows)
    may = fleet.accepting(view)
    may[worker] = False
    capacity = float(view.workers.capacity[worker])
    for keep_s in keeps_s:
        i, dst = relief(rows, size, grow, hosts, fleet.room, fleet.growth, may, worker, capacity,
                        keep_s, RELIEF_WORTH)  # fmt: skip
        if dst:
            return int(rows[i]), int(dst)
    return None


def _moved(view: View, fleet: _Fleet, src: int, row: int, dst: int) -> Move:
    size, grow, _ = _sizes(view, np.array([row]))
    fleet.give(size[0], grow[0], src, dst)
    fleet.takes[src] = False  # or one would undo what another did
    return Move(int(view.requests.request_id[row]), dst, "overflow")


def _opening(view: View, fleet: _Fleet, worker: int, rows: np.ndarray) -> tuple[int, int] | None:
    """A request to an empty worker: a large one, for nothing else may fit it soon."""
    size, _, hosts = _sizes(view, rows)
    modest = size <= OPENING_SHARE * view.workers.capacity[worker]
    i = int(np.argmax(np.where(modest, size, -1)) if modest.any() else np.argmin(size))
    empty = fleet.takes & (view.workers.num_requests == 0) & hosts[i] & (fleet.room >= size[i])
    if not empty.any():
        return None
    return int(rows[i]), int(np.argmax(empty))


def _one_worker_more(view: View) -> list[Proposal]:
    """Stop emptying a worker, or wake one; nothing if one is waking already."""
    workers = view.workers
    if workers.workers(WorkerState.WAKING) or (view.active() & (workers.num_requests == 0)).any():
        return []
    idle = workers.workers(WorkerState.DRAINING) or workers.workers(WorkerState.PARKED)
    return [WakeWorker(w) for w in idle[:1]]


# --- emptying ------------------------------------------------------------------------------------


def _go_on_draining(view: View, fleet: _Fleet) -> list[Proposal]:
    """What is still on a draining worker, as far as it fits elsewhere."""
    proposals: list[Proposal] = []
    for worker in view.workers.workers(WorkerState.DRAINING):
        rows = fleet.on(worker)
        rows = rows[view.requests.movable[rows]]
        size, grow, hosts = _sizes(view, rows)
        for i, row in enumerate(rows.tolist()):
            may = fleet.accepting(view) & hosts[i]
            dst = int(tightest(fleet.room, fleet.growth, may, size[i], grow[i],
                               _scale(view) * LAST_S))  # fmt: skip
            if dst:
                fleet.give(size[i], grow[i], worker, dst)
                proposals.append(Move(int(view.requests.request_id[row]), dst, "drain"))
    return proposals


def _drain(view: View, fleet: _Fleet) -> list[Proposal]:
    """Empty the workers that hold least, one after the other, while what they hold fits elsewhere.

    Short answers leave many workers almost empty within a moment: one a round would lag behind.
    """
    workers = view.workers
    if view.waiting_bytes or (workers.state == WorkerState.DRAINING).any():
        return []
    busy = view.active() & (workers.num_requests > 0)
    fleet.takes &= busy  # to move into an empty worker would gain nothing
    held = np.where(busy, 1 - workers.budget / np.maximum(workers.capacity, 1), np.inf)
    proposals: list[Proposal] = []
    touched = ~fleet.takes  # gave in this round
    failed = 0
    for victim in np.argsort(held, kind="stable")[: int(busy.sum())].tolist():
        if failed == DRAIN_TRIES:
            break
        took = fleet.seats[victim] != workers.max_requests[victim] - workers.num_requests[victim]
        rows = None if touched[victim] or took else fleet.settled(view, victim)
        moves = [] if rows is None else _empty(view, fleet, victim, rows)
        failed = 0 if moves else failed + 1
        proposals += [Drain(victim), *moves] if moves else []
    return proposals


def _empty(view: View, fleet: _Fleet, victim: int, rows: np.ndarray) -> list[Proposal]:
    """All moves away from this worker, or none."""
    size, grow, hosts = _sizes(view, rows)
    order = np.argsort(-size, kind="stable")
    dst = np.zeros(len(rows), np.int64)
    fleet.takes[victim] = False
    if not emptied(size[order], grow[order], hosts[order], fleet.room, fleet.growth, fleet.seats,
                   fleet.takes, _scale(view) * DRAIN_S + 2 * view.cost.wake_s, dst):  # fmt: skip
        fleet.takes[victim] = True
        return []
    ids = view.requests.request_id[rows[order]]
    return [Move(int(r), int(w), "drain") for r, w in zip(ids, dst, strict=True)]
