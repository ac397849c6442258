"""Parallel-for: every item runs once, on any number of the threads that should run it."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numba import njit

from mellmpi.engine.cpu.parallel_for import KERNEL, fetch_add, parallel_for, thread_group


@njit(**KERNEL)
def count(threads, phases, items, done, order_kept):
    """Add 1 to each item of each phase, and check that the phase before is complete."""
    for phase in range(phases):
        for first, last in parallel_for(threads, phase, items):
            for item in range(first, last):
                if phase > 0 and done[phase - 1].sum() != items:
                    order_kept[0] = False
                fetch_add(done[phase].ctypes.data, item, 1)


def run(threads, started, phases=6, items=50):
    """(runs of each item, whether phases ran in order) on `started` threads of a group."""
    (group, _counters), done = thread_group(phases, threads), np.zeros((phases, items), np.int64)
    order_kept = np.ones(1, np.bool_)
    with ThreadPoolExecutor(started) as pool:
        for future in [
            pool.submit(count, group, phases, items, done, order_kept) for _ in range(started)
        ]:
            future.result()
    return done, order_kept[0]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_item_is_done_once_and_phases_run_in_order(threads):
    done, order_kept = run(threads, started=threads)
    assert (done == 1).all() and order_kept


def test_one_thread_of_a_group_of_four_does_all_items():
    done, order_kept = run(4, started=1)
    assert (done == 1).all() and order_kept


def test_a_phase_without_items_ends_at_once():
    done, _ = run(2, started=2, items=0)
    assert done.size == 0
