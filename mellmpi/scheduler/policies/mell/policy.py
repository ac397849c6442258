"""MELL, the paper's policy (arXiv 2501.06709, section VI): classes by size, few moves an operation.

Workers are packed in groups that run the same models and have arenas of one size. The size of a
request is what it will hold when the next round's moves are done: overload is cured before it
happens. docs/policies.md says what is done where the paper is silent.
"""

import numpy as np

from mellmpi.scheduler.ledger import WorkerState
from mellmpi.scheduler.policies.base import idle_workers
from mellmpi.scheduler.policies.mell.epoch import doable, epoch
from mellmpi.scheduler.policies.mell.kernels import LAST, OPENED, REASONS, Bins, Items, L, allocate
from mellmpi.scheduler.size_classes import SizeClassCounts
from mellmpi.scheduler.view import MoveProposal, Proposal, View, WakeWorker

LEAD_TICKS = 3.0  # what overflows within so many rounds and a transfer is cured now
BOUNDS = (1 / 4, 1 / 3, 1 / 2)  # T, S, M, L, as shares of a worker


def place(view: View, row: int, model: str) -> int | None:
    """Where Allocate puts it, if it fits there now; with no worker to open, the fullest that fits.

    Waiting for a worker to be woken is left to the cluster scheduler.
    """
    workers, size_classes = view.workers, view.size_classes
    if size_classes is None:
        size_classes = _take_census(view)
    need = view.requests.need(row)
    lead_s = LEAD_TICKS * view.period_s + view.cost.transfer_s(need)
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
    """One epoch: the moves by which the plan differs from what is, and the empty workers."""
    proposals: list[Proposal] = []
    rows, on = _placed(view)
    kinds = np.zeros(len(rows), np.int64)
    lacking = False
    for group in _groups(view):
        local = np.full(len(view.workers.state), -1)
        local[group] = np.arange(len(group))
        inside = np.flatnonzero(local[on] >= 0)
        where = local[on[inside]]
        items, bins = _packing(view, group, rows[inside], where)
        asleep = _asleep(view, group)
        waits = len(asleep) > 0 and view.cost.wake_s <= _lead_s(view)
        load = bins.load + np.bincount(where, items.size, len(group))
        epoch(items, bins, OPENED if waits else LAST, _census(view).operations)
        kinds[inside] = items.kind
        proposals += _moves(view, group, rows[inside], where, items, load)
        wanted = int(np.ceil(items.homeless[0]))
        proposals += [WakeWorker(w) for w in asleep[:wanted].tolist()]
        lacking |= wanted > 0
    _census(view).recount(rows, kinds, on)
    return proposals if lacking else proposals + idle_workers(view)


def _moves(
    view: View,
    group: np.ndarray,
    rows: np.ndarray,
    where: np.ndarray,
    items: Items,
    load: np.ndarray,
) -> list[Proposal]:
    """What is not where it was. Those of one piece carry one number."""
    changed = np.flatnonzero(doable(items, where, load))
    changed = changed[np.argsort(items.piece[changed], kind="stable")]
    ids, to = view.requests.request_id[rows[changed]], group[items.where[changed]]
    numbers, why = items.piece[changed], items.why[changed]
    columns = ids.tolist(), to.tolist(), why.tolist(), numbers.tolist()
    return [MoveProposal(i, w, REASONS[r], bundle=p) for i, w, r, p in zip(*columns, strict=True)]


def _lead_s(view: View) -> float:
    """Until the moves of the next round have been made."""
    held = view.workers.capacity - view.workers.free
    mean = int(held.sum()) // max(1, int(view.workers.num_requests.sum()))
    return LEAD_TICKS * view.period_s + view.cost.transfer_s(mean)


def _lead_tokens(view: View) -> float:
    return max(1.0, view.token_rate * _lead_s(view))


def _grown(view: View, rows: np.ndarray) -> np.ndarray:
    """float64 [rows]: bytes that they will hold by then."""
    requests = view.requests
    return np.asarray(requests.kv_bytes(rows) + _lead_tokens(view) * requests.token_bytes[rows])


def _placed(view: View) -> tuple[np.ndarray, np.ndarray]:
    """(rows, workers) of all requests that are on one."""
    rows = np.flatnonzero(view.requests.live & (view.requests.worker > 0))
    return rows, view.requests.worker[rows]


def _census(view: View) -> SizeClassCounts:
    if view.size_classes is None:
        view.size_classes = SizeClassCounts(BOUNDS, len(view.workers.state) - 1)
    return view.size_classes


def _take_census(view: View) -> SizeClassCounts:
    """The first one: from then on it is kept."""
    size_classes, (rows, on) = _census(view), _placed(view)
    share = _grown(view, rows) / np.maximum(view.workers.capacity[on], 1)
    size_classes.recount(rows, 1 + np.searchsorted(BOUNDS, share), on)
    return size_classes


def _groups(view: View) -> list[np.ndarray]:
    """Active workers by models and capacity, each group ascending."""
    active = np.flatnonzero(view.active())
    if not len(active):
        return []
    key = np.vstack([view.workers.runs[:, active], view.workers.capacity[active]])
    if (key == key[:, :1]).all():
        return [active]  # by far the most frequent answer
    _, which = np.unique(key, axis=1, return_inverse=True)
    return [active[which == g] for g in range(int(which.max()) + 1)]


def _asleep(view: View, group: np.ndarray) -> np.ndarray:
    """Workers like these that can be woken, those that are only being emptied first."""
    workers, like = view.workers, group[0]
    same = (workers.runs == workers.runs[:, like : like + 1]).all(axis=0)
    same &= workers.capacity == workers.capacity[like]
    draining, parked = (
        np.flatnonzero(same & (workers.state == state))
        for state in (WorkerState.DRAINING, WorkerState.PARKED)
    )
    return np.concatenate([draining, parked])


def _packing(
    view: View, group: np.ndarray, rows: np.ndarray, where: np.ndarray
) -> tuple[Items, Bins]:
    """The group as bins, its requests as items."""
    workers, requests = view.workers, view.requests
    capacity = float(workers.capacity[group[0]])
    known = np.bincount(where, weights=requests.kv_bytes(rows), minlength=len(group))
    coming = np.maximum(0, workers.capacity[group] - workers.budget[group] - known) / capacity
    coming[coming < 1e-9] = 0
    bins = Bins(
        load=coming,
        soft=np.zeros(len(group)),
        num=np.zeros((L + 1, len(group)), np.int64),
        age=workers.activated[group],
        seats=workers.max_requests[group] - workers.num_requests[group],
        usable=workers.num_returning[group] == 0,
        held=workers.num_requests[group] > 0,
        now=np.zeros(len(group)),
    )
    size = np.minimum(_grown(view, rows), capacity) / capacity
    return items_of(size, where, ~requests.movable[rows], len(group)), bins


def items_of(size: np.ndarray, where: np.ndarray, pinned: np.ndarray, num_bins: int) -> Items:
    """Items of these sizes on these bins; `epoch` fills in the rest."""
    n = len(size)
    return Items(
        size=size,
        kind=np.zeros(n, np.int64),
        where=where.astype(np.int64),
        pinned=pinned,
        piece=np.zeros(n, np.int64),
        after=np.zeros(n, np.int64),
        before=np.zeros(n, np.int64),
        first=np.zeros(num_bins, np.int64),
        why=np.zeros(n, np.int64),
        made=np.zeros(1, np.int64),
        homeless=np.zeros(1),
    )


def warm_up() -> None:
    """Compile everything now rather than when the first request waits for it."""
    rows, floats = np.zeros(2, np.int64), np.ones(2)
    bins = Bins(
        np.zeros(2),
        np.zeros(2),
        np.zeros((L + 1, 2), np.int64),
        rows,
        rows,
        np.ones(2, np.bool_),
        np.zeros(2, np.bool_),
        np.zeros(2),
    )
    items = items_of(np.full(2, 0.1), rows, np.zeros(2, np.bool_), 2)
    epoch(items, bins, LAST, 1)
    doable(items, rows.copy(), floats.copy())
    some = np.ones(2, np.bool_)
    allocate(
        rows,
        rows,
        rows,
        rows,
        rows,
        floats,
        np.zeros(2, np.int8),
        some,
        some,
        rows,
        np.zeros((L + 1, 2), np.int64),
        1,
        1.0,
        1.0,
    )
