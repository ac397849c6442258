"""Counts of requests by size class and worker."""

import numpy as np

from mellmpi.scheduler import Ledger
from mellmpi.scheduler.size_classes import SizeClassCounts
from tests.scheduler.stage import KV


def ledger():
    workers = Ledger(2)
    for w in (1, 2):
        workers.ready(w, (KV,), 200, 8, acked=0)
    return workers


def size_classes(*rows):
    found = SizeClassCounts((1 / 4, 1 / 2), num_workers=2)
    placed = np.array([row for row, *_ in rows], np.int64)
    found.recount(
        placed,
        np.array([k for _, k, _ in rows], np.int64),
        np.array([w for *_, w in rows], np.int64),
    )
    return found


def test_a_new_request_is_classed_by_its_share_of_the_worker():
    found, workers = size_classes(), ledger()
    for row, num_bytes in enumerate([50, 51, 100, 101]):
        found.enter(row, num_bytes, 0, 1, workers)
    assert found.num[:, 1].tolist() == [0, 1, 2, 1]


def test_a_moved_request_keeps_its_class_and_a_removed_one_is_not_counted():
    found, workers = size_classes((0, 1, 1), (1, 3, 1)), ledger()
    found.enter(1, 10, 1, 2, workers)
    assert found.num.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    found.enter(0, 10, 1, 0, workers)
    assert found.num[:, 1].sum() == 0


def test_rows_grow_on_demand():
    found, workers = size_classes(), ledger()
    found.enter(1000, 10, 0, 2, workers)
    assert found.kind[1000] == 1 and found.num[1, 2] == 1


def test_a_recount_replaces_all_counts():
    found = size_classes((0, 1, 1), (1, 3, 1))
    found.recount(np.array([5]), np.array([2]), np.array([2]))
    assert found.num.sum() == 1 and found.num[2, 2] == 1 and found.kind[:2].tolist() == [0, 0]
