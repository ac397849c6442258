"""The compiled kernels of `frugal` against their plain Python, on random clusters."""

import math

import numpy as np
import pytest

from mellmpi.scheduler.policies import kernels
from mellmpi.scheduler.policies.kernels import (
    best_placement,
    best_relief,
    decay,
    empty_worker,
    placement_cost,
    warm_up,
)

PARAMS = (2.4, 1 / 5.5, 1 / 8.5)
REQUESTS, WORKERS = ("size", "size_growth", "model", "runs"), ("free", "growth", "end_rate")


def cluster(seed, workers=6, n=5):
    rng = np.random.default_rng(seed)
    return {
        "free": rng.uniform(-5, 40, workers),
        "growth": rng.uniform(0, 5, workers),
        "end_rate": rng.uniform(0, 0.2, workers),
        "may": rng.random(workers) < 0.7,
        "size": rng.uniform(1, 20, n),
        "size_growth": rng.uniform(0, 2, n),
        "model": rng.integers(0, 2, n),
        "runs": rng.random((2, workers)) < 0.8,
        "slots": rng.integers(0, 4, workers),
    }


def relieve(c, request_end_rate, price, keep_s, kernel=best_relief):
    """Worker 2 gives a request away."""
    columns = [c[name] for name in (*REQUESTS, *WORKERS, "may")]
    return kernel(*columns, 2, request_end_rate, price, keep_s, PARAMS)


def empty(c, dst, worker=0, request_end_rate=0.05, price=0.01, keep_s=1.0, kernel=empty_worker):
    columns = [c[name] for name in (*REQUESTS, *WORKERS, "slots", "may")]
    return kernel(*columns, worker, request_end_rate, price, keep_s, PARAMS, dst)


def test_decay_is_near_the_exponential_and_never_rises():
    x = np.linspace(0, 20, 400)
    found = np.array([decay(v) for v in x])
    assert np.abs(found - np.exp(-x)).max() < 0.02
    assert (np.diff(found) <= 0).all() and found[-1] == 0


def test_a_near_overflow_costs_most_and_idle_memory_least():
    full, tight, idle = (placement_cost(free, 1.0, 0.0, PARAMS) for free in (0.0, 9.0, 1e6))
    assert full == placement_cost(-5.0, 1.0, 0.0, PARAMS) == PARAMS[0]
    assert full > tight and idle == pytest.approx(1.0)
    # A request may end before the overflow.
    assert placement_cost(2.0, 1.0, 1.0, PARAMS) < placement_cost(2.0, 1.0, 0.0, PARAMS)
    assert placement_cost(5.0, 0.0, 0.0, PARAMS) == pytest.approx(1.0)  # it never overflows


@pytest.mark.parametrize("seed", range(50))
def test_a_placement_equals_that_of_plain_python_fits_and_keeps_its_time(seed):
    rng = np.random.default_rng(seed)
    free, ordered = rng.integers(0, 100, 7), rng.integers(0, 20, 7)
    number, most = rng.integers(0, 5, 7), np.full(7, 4)
    token_bytes, block_bytes = rng.uniform(0.5, 2, 7), rng.choice([1, 6], 7)
    state, able = rng.choice([1, 1, 1, 4], 7).astype(np.int8), rng.random(7) < 0.5
    growth, accepts = rng.uniform(0, 9, 7), rng.random(7) < 0.8
    need, keep_s, rate = int(rng.integers(1, 30)), 1.5, float(rng.choice([0.0, 2.0]))
    ledger = free, ordered, number, most, token_bytes, block_bytes, state, able
    args = (*ledger, growth, accepts, need, 1.0, 0.1, rate, 4.0, keep_s, PARAMS)
    worker = best_placement(*args)
    assert worker == best_placement.py_func(*args)
    kept = half = np.where(block_bytes > token_bytes, block_bytes / 2, 0)
    if not (able & (state == 4))[1:].any():
        kept = np.maximum(kept, 4.0 * token_bytes)
    left = free - ordered - number * kept - need - half
    rates = (number * token_bytes * rate if rate else growth) + 1.0
    fits = accepts & (number > 0) & (number < most) & (left >= np.maximum(0, keep_s * rates))
    assert fits[worker] if worker else not fits[1:].any()


@pytest.mark.parametrize("seed", range(50))
def test_a_relief_equals_that_of_plain_python_and_fits(seed):
    c = cluster(seed)
    c["may"][2] = False
    row, dst = relieve(c, 0.05, 0.01, 1.0)
    assert (row, dst) == relieve(c, 0.05, 0.01, 1.0, best_relief.py_func)
    assert (row == -1) == (dst == 0)
    if dst:
        assert c["may"][dst] and c["runs"][c["model"][row], dst]
        left, rate = c["free"][dst] - c["size"][row], c["growth"][dst] + c["size_growth"][row]
        assert left >= 0 and left >= rate


def test_of_many_requests_some_of_every_size_are_candidates():
    c = cluster(0, n=200)
    c["free"][:], c["may"][:], c["runs"][:] = 1e3, True, True
    c["free"][2], c["may"][2] = 0.0, False
    c["size_growth"][:] = 0.0
    for price, rank in ((0.0, "max"), (10.0, "min")):
        row, _ = relieve(c, 0.0, price, 0.0)
        assert c["size"][row] == pytest.approx(getattr(c["size"], rank)(), abs=2.0)


@pytest.mark.parametrize("seed", range(50))
def test_a_worker_is_emptied_of_all_requests_or_nothing_changes(seed):
    c, twin = cluster(seed, n=3), cluster(seed, n=3)
    dst, dst_twin = np.zeros(3, np.int64), np.zeros(3, np.int64)
    before = {k: v.copy() for k, v in c.items()}
    done = empty(c, dst)
    assert done == empty(twin, dst_twin, kernel=empty_worker.py_func)
    for name in c:
        np.testing.assert_allclose(c[name], twin[name])
    if done:
        assert (dst > 0).all() and (dst == dst_twin).all() and (c["slots"] >= 0).all()
        assert c["free"].sum() == pytest.approx(before["free"].sum() - c["size"].sum())
    else:
        for name in (*WORKERS, "slots"):
            np.testing.assert_allclose(c[name], before[name])


def test_a_worker_is_not_emptied_where_that_raises_the_total_cost():
    def empties(left_s, price=0.0):
        c = {
            "free": np.array([0.0, 100.0, 40.0 + left_s * 2]),
            "growth": np.array([0.0, 1.0, 1.0]),
            "end_rate": np.zeros(3),
            "may": np.array([False, False, True]),
            "size": np.array([40.0]),
            "size_growth": np.ones(1),
            "model": np.zeros(1, np.int64),
            "runs": np.ones((1, 3), np.bool_),
            "slots": np.ones(3, np.int64),
        }
        return empty(c, np.zeros(1, np.int64), 1, 0.0, price, 0.0)

    assert empties(math.inf) and empties(8.0) and not empties(0.5)
    assert not empties(8.0, price=0.05)


def test_warming_up_compiles_every_kernel():
    warm_up()
    compiled = [k for k in vars(kernels).values() if hasattr(k, "py_func")]
    assert compiled and all(kernel.signatures for kernel in compiled)


@pytest.mark.parametrize("seed", range(30))
def test_of_all_moves_a_relief_is_the_one_with_the_lowest_cost(seed):
    c = cluster(seed)
    c["free"][2], c["may"][2], price, end_rate = 3.0, False, 0.05, 0.01

    def cost(moved, dst):
        total = 0.0
        for w in (2, dst):
            sign = -1 if w == 2 else 1
            growth = c["growth"][w] + sign * c["size_growth"][moved]
            left = c["free"][w] - sign * c["size"][moved]
            rate = c["end_rate"][w] + sign * end_rate
            total += placement_cost(left, max(growth, 0.0), rate, PARAMS)
        total -= placement_cost(c["free"][dst], c["growth"][dst], c["end_rate"][dst], PARAMS)
        return total + price * c["size"][moved]

    found = {
        (i, w): cost(i, w)
        for i in range(5)
        for w in range(1, 6)
        if c["may"][w]
        and c["runs"][c["model"][i], w]
        and c["free"][w] - c["size"][i] >= c["growth"][w] + c["size_growth"][i]
    }
    row, dst = relieve(c, end_rate, price, 1.0)
    assert (row, dst) in found if found else dst == 0
    if found:
        assert found[row, dst] == pytest.approx(min(found.values()))


@pytest.mark.parametrize("seed", range(20))
def test_each_emptied_request_counts_those_placed_before_it(seed):
    rng = np.random.default_rng(seed)
    free, growth = rng.uniform(40, 90, 5), rng.uniform(1, 9, 5)
    size, dst = np.array([12.0, 9.0, 9.0, 5.0]), np.zeros(4, np.int64)
    expected, left, rate = [], free.copy(), growth.copy()
    for need in size:
        added = [
            placement_cost(left[w] - need, rate[w] + 1, 0.0, PARAMS)
            - placement_cost(left[w], rate[w], 0.0, PARAMS)
            for w in range(2, 5)
        ]
        best = 2 + int(np.argmin(added))
        left[best], rate[best] = left[best] - need, rate[best] + 1
        expected.append(best)
    c = {
        "free": free,
        "growth": growth,
        "end_rate": np.zeros(5),
        "may": np.arange(5) > 1,
        "size": size,
        "size_growth": np.ones(4),
        "model": np.zeros(4, np.int64),
        "runs": np.ones((1, 5), np.bool_),
        "slots": np.full(5, 9),
    }
    empty(c, dst, 1, 0.0, 0.0, 0.0)
    assert dst.tolist() == expected
