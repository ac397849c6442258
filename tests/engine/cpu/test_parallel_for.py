"""The team: every item once, by whoever comes; nobody needs all threads to come."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numba import njit

from mellmpi.engine.cpu.parallel_for import KERNEL, fetch_add, shares, team


@njit(**KERNEL)
def count(team, phases, items, done, order_kept):
    """Each phase adds 1 to each of its items, having seen the one before complete."""
    for phase in range(phases):
        for first, last in shares(team, phase, items):
            for item in range(first, last):
                if phase > 0 and done[phase - 1].sum() != items:
                    order_kept[0] = False
                fetch_add(done[phase].ctypes.data, item, 1)


def run(threads, come, phases=6, items=50):
    (shared, _counters), done = team(phases, threads), np.zeros((phases, items), np.int64)
    order_kept = np.ones(1, np.bool_)
    with ThreadPoolExecutor(come) as pool:
        for future in [
            pool.submit(count, shared, phases, items, done, order_kept) for _ in range(come)
        ]:
            future.result()
    return done, order_kept[0]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_item_is_done_once_and_phases_follow_each_other(threads):
    done, order_kept = run(threads, come=threads)
    assert (done == 1).all() and order_kept


def test_a_team_whose_helpers_never_come_still_finishes():
    done, order_kept = run(4, come=1)
    assert (done == 1).all() and order_kept


def test_a_phase_without_items_is_over_at_once():
    done, _ = run(2, come=2, items=0)
    assert done.size == 0
