"""MELL (INFOCOM 2025, arXiv 2501.06709): packing by size classes, few moves for each operation.

Which part follows which part of the paper:

- `place`, `kernels.allocate`, `kernels.target`: Allocate (section VI)
- `epoch._relieve`: Update, for requests that have grown (section VI)
- `epoch._pair`, `epoch._gather`, `fill`: Depart, which restores the invariants (section VI)
- `rebalance`, `epoch.epoch`: the operations of an epoch are handled together (section VI.C)
- `kernels.bundles`: multi-items (section VI)

Where the paper leaves a gap ("gap 1" to "gap 5" in comments), see docs/policies.md. Workers are
packed in groups with the same models and KV capacity. The size of a request is what it will hold
when the moves of the next round are done, so that overloads are relieved before they happen.
"""

import numpy as np

from mellmpi.scheduler.ledger import WorkerState
from mellmpi.scheduler.policies.base import park_empty
from mellmpi.scheduler.policies.mell.epoch import epoch, feasible
from mellmpi.scheduler.policies.mell.kernels import (
    ANY_FIT,
    NEW_BIN,
    REASONS,
    Bins,
    Items,
    L,
    allocate,
)
from mellmpi.scheduler.size_classes import SizeClassCounts
from mellmpi.scheduler.view import MoveProposal, Proposal, View, WakeWorker

LEAD_ROUNDS = 3.0  # sizes are those after this many rounds and a transfer
BOUNDS = (1 / 4, 1 / 3, 1 / 2)  # upper bounds of T, S and M, as shares of a worker


def place(view: View, row: int, model: str) -> int | None:
    """The worker that Allocate chooses, if the request fits there now; else None.

    While no further worker can become active, the fullest worker on which it fits.
    """
    workers, size_classes = view.workers, view.size_classes
    if size_classes is None:
        size_classes = _first_count(view)
    need = view.requests.need(row)
    lead_s = LEAD_ROUNDS * view.period_s + view.cost.transfer_s(need)
    tokens = max(1.0, view.token_rate * lead_s)
    grown = need + tokens * float(view.requests.token_bytes[row])
    worker = allocate(
        workers.capacity,
        workers.free,
        workers.ordered,
        workers.num_requests,
        workers.max_requests,
        workers.token_bytes,
        workers.state,
        workers.able(model),
        view.hosting(model),
        workers.activated,
        size_classes.num,
        need,
        grown,
        tokens,
    )
    return int(worker) if worker >= 0 else None


def rebalance(view: View) -> list[Proposal]:
    """One epoch: moves, workers to wake, and empty workers to park."""
    proposals: list[Proposal] = []
    rows, on = _placed(view)
    kinds = np.zeros(len(rows), np.int64)
    lacking = False
    for group in _groups(view):
        local = np.full(len(view.workers.state), -1)
        local[group] = np.arange(len(group))
        inside = np.flatnonzero(local[on] >= 0)
        bin_before = local[on[inside]]
        items, bins = _packing(view, group, rows[inside], bin_before)
        inactive = _inactive_workers(view, group)
        wakes_in_time = len(inactive) > 0 and view.cost.wake_s <= _lead_s(view)
        load = bins.load + np.bincount(bin_before, items.size, len(group))
        epoch(items, bins, NEW_BIN if wakes_in_time else ANY_FIT, _counts(view).operations)
        kinds[inside] = items.kind
        proposals += _moves(view, group, rows[inside], bin_before, items, load)
        wanted = int(np.ceil(items.unplaced[0]))
        proposals += [WakeWorker(w) for w in inactive[:wanted].tolist()]
        lacking |= wanted > 0
    _counts(view).recount(rows, kinds, on)
    return proposals if lacking else proposals + park_empty(view)


def _moves(
    view: View,
    group: np.ndarray,
    rows: np.ndarray,
    bin_before: np.ndarray,
    items: Items,
    load: np.ndarray,
) -> list[Proposal]:
    """Feasible moves of the epoch; the members of a bundle have the same `bundle` number."""
    moved = np.flatnonzero(feasible(items, bin_before, load))
    moved = moved[np.argsort(items.bundle[moved], kind="stable")]
    ids, to = view.requests.request_id[rows[moved]], group[items.bin_of[moved]]
    columns = ids.tolist(), to.tolist(), items.rule[moved].tolist(), items.bundle[moved].tolist()
    return [MoveProposal(i, w, REASONS[r], bundle=b) for i, w, r, b in zip(*columns, strict=True)]


def _lead_s(view: View) -> float:
    """Seconds until the moves of the next round are done."""
    held = view.workers.capacity - view.workers.free
    mean_bytes = int(held.sum()) // max(1, int(view.workers.num_requests.sum()))
    return LEAD_ROUNDS * view.period_s + view.cost.transfer_s(mean_bytes)


def _grown(view: View, rows: np.ndarray) -> np.ndarray:
    """float64 [rows]: bytes that the requests will hold in `_lead_s`."""
    requests = view.requests
    tokens = max(1.0, view.token_rate * _lead_s(view))
    return np.asarray(requests.kv_bytes(rows) + tokens * requests.token_bytes[rows])


def _placed(view: View) -> tuple[np.ndarray, np.ndarray]:
    """(rows, workers) of all requests that are on a worker."""
    rows = np.flatnonzero(view.requests.live & (view.requests.worker > 0))
    return rows, view.requests.worker[rows]


def _counts(view: View) -> SizeClassCounts:
    """The view's counts by size class, created at the first call."""
    if view.size_classes is None:
        view.size_classes = SizeClassCounts(BOUNDS, len(view.workers.state) - 1)
    return view.size_classes


def _first_count(view: View) -> SizeClassCounts:
    """Counts by size class before the first epoch."""
    size_classes, (rows, on) = _counts(view), _placed(view)
    share = _grown(view, rows) / np.maximum(view.workers.capacity[on], 1)
    size_classes.recount(rows, 1 + np.searchsorted(BOUNDS, share), on)
    return size_classes


def _groups(view: View) -> list[np.ndarray]:
    """Active workers grouped by models and capacity, each group in ascending order."""
    active = np.flatnonzero(view.active())
    if not len(active):
        return []
    key = np.vstack([view.workers.runs[:, active], view.workers.capacity[active]])
    if (key == key[:, :1]).all():
        return [active]
    _, which = np.unique(key, axis=1, return_inverse=True)
    return [active[which == g] for g in range(int(which.max()) + 1)]


def _inactive_workers(view: View, group: np.ndarray) -> np.ndarray:
    """Workers with the group's models and capacity that can be activated: draining ones first."""
    workers, first = view.workers, group[0]
    same = (workers.runs == workers.runs[:, first : first + 1]).all(axis=0)
    same &= workers.capacity == workers.capacity[first]
    draining, parked = (
        np.flatnonzero(same & (workers.state == state))
        for state in (WorkerState.DRAINING, WorkerState.PARKED)
    )
    return np.concatenate([draining, parked])


def _packing(
    view: View, group: np.ndarray, rows: np.ndarray, bin_of: np.ndarray
) -> tuple[Items, Bins]:
    """The group's requests as items, its workers as bins."""
    workers, requests = view.workers, view.requests
    capacity = float(workers.capacity[group[0]])
    held = np.bincount(bin_of, weights=requests.kv_bytes(rows), minlength=len(group))
    incoming = np.maximum(0, workers.capacity[group] - workers.budget[group] - held) / capacity
    incoming[incoming < 1e-9] = 0
    bins = Bins(
        load=incoming,
        movable_t=np.zeros(len(group)),
        counts=np.zeros((L + 1, len(group)), np.int64),
        activated=workers.activated[group],
        slots=workers.max_requests[group] - workers.num_requests[group],
        accepts=workers.num_returning[group] == 0,
        occupied=workers.num_requests[group] > 0,
        load_now=np.zeros(len(group)),
    )
    size = np.minimum(_grown(view, rows), capacity) / capacity
    return items_of(size, bin_of, ~requests.movable[rows], len(group)), bins


def items_of(size: np.ndarray, bin_of: np.ndarray, pinned: np.ndarray, num_bins: int) -> Items:
    """Items of these sizes on these bins; `epoch` computes the other columns."""
    n = len(size)
    return Items(
        size=size,
        kind=np.zeros(n, np.int64),
        bin_of=bin_of.astype(np.int64),
        pinned=pinned,
        bundle=np.zeros(n, np.int64),
        next=np.zeros(n, np.int64),
        prev=np.zeros(n, np.int64),
        head=np.zeros(num_bins, np.int64),
        rule=np.zeros(n, np.int64),
        num_moves=np.zeros(1, np.int64),
        unplaced=np.zeros(1),
    )


def warm_up() -> None:
    """Compile all kernels, so that the first request does not wait for it."""
    ints, floats, state = np.zeros(2, np.int64), np.ones(2), np.zeros(2, np.int8)
    yes, no, counts = np.ones(2, np.bool_), np.zeros(2, np.bool_), np.zeros((L + 1, 2), np.int64)
    bins = Bins(np.zeros(2), np.zeros(2), counts, ints, ints, yes, no, np.zeros(2))
    items = items_of(np.full(2, 0.1), ints, no, 2)
    epoch(items, bins, ANY_FIT, 1)
    feasible(items, ints.copy(), floats.copy())
    ledger = ints, ints, ints, ints, ints, floats, state, yes, yes, ints
    allocate(*ledger, np.zeros((L + 1, 2), np.int64), 1, 1.0, 1.0)
