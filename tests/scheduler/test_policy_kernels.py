"""The compiled kernels of `frugal` against their own Python, on random clusters."""

import math

import numpy as np
import pytest

from mellmpi.scheduler.policies import kernels
from mellmpi.scheduler.policies.kernels import decay, emptied, place_on, relief, strain, warm_up

PAR = (2.4, 1 / 5.5, 1 / 8.5)


def cluster(seed, workers=6, n=5):
    rng = np.random.default_rng(seed)
    return {
        "room": rng.uniform(-5, 40, workers),
        "growth": rng.uniform(0, 5, workers),
        "leaving": rng.uniform(0, 0.2, workers),
        "may": rng.random(workers) < 0.7,
        "size": rng.uniform(1, 20, n),
        "grow": rng.uniform(0, 2, n),
        "model": rng.integers(0, 2, n),
        "runs": rng.random((2, workers)) < 0.8,
        "seats": rng.integers(0, 4, workers),
    }


def test_decay_is_near_the_exponential_and_never_rises():
    x = np.linspace(0, 20, 400)
    found = np.array([decay(v) for v in x])
    assert np.abs(found - np.exp(-x)).max() < 0.02
    assert (np.diff(found) <= 0).all() and found[-1] == 0


def test_a_strain_counts_a_near_overflow_most_and_idle_room_least():
    full, tight, idle = (strain(room, 1.0, 0.0, PAR) for room in (0.0, 9.0, 1e6))
    assert full == strain(-5.0, 1.0, 0.0, PAR) == PAR[0]
    assert full > tight and idle == pytest.approx(1.0)
    assert strain(2.0, 1.0, 1.0, PAR) < strain(2.0, 1.0, 0.0, PAR)  # somebody will leave before
    assert strain(5.0, 0.0, 0.0, PAR) == pytest.approx(1.0)  # it never overflows


@pytest.mark.parametrize("seed", range(50))
def test_a_place_is_that_of_the_python_twin_fits_and_keeps_its_time(seed):
    rng = np.random.default_rng(seed)
    free, ordered = rng.integers(0, 100, 7), rng.integers(0, 20, 7)
    number, most = rng.integers(0, 5, 7), np.full(7, 4)
    token_bytes, block_bytes = rng.uniform(0.5, 2, 7), rng.choice([1, 6], 7)
    state, able = rng.choice([1, 1, 1, 4], 7).astype(np.int8), rng.random(7) < 0.5
    growth, takes = rng.uniform(0, 9, 7), rng.random(7) < 0.8
    need, keep_s, rate = int(rng.integers(1, 30)), 1.5, float(rng.choice([0.0, 2.0]))
    args = (
        free,
        ordered,
        number,
        most,
        token_bytes,
        block_bytes,
        state,
        able,
        growth,
        takes,
        need,
        1.0,
        0.1,
        rate,
        4.0,
        keep_s,
        PAR,
    )
    worker = place_on(*args)
    assert worker == place_on.py_func(*args)
    kept = half = np.where(block_bytes > token_bytes, block_bytes / 2, 0)
    if not (able & (state == 4))[1:].any():
        kept = np.maximum(kept, 4.0 * token_bytes)
    left = free - ordered - number * kept - need - half
    rates = (number * token_bytes * rate if rate else growth) + 1.0
    fits = takes & (number > 0) & (number < most) & (left >= np.maximum(0, keep_s * rates))
    assert fits[worker] if worker else not fits[1:].any()


@pytest.mark.parametrize("seed", range(50))
def test_a_relief_is_that_of_the_python_twin_and_fits(seed):
    c = cluster(seed)
    c["may"][2] = False
    args = (
        c["size"],
        c["grow"],
        c["model"],
        c["runs"],
        c["room"],
        c["growth"],
        c["leaving"],
        c["may"],
        2,
        0.05,
        0.01,
        1.0,
        PAR,
    )
    row, dst = relief(*args)
    assert (row, dst) == relief.py_func(*args)
    assert (row == -1) == (dst == 0)
    if dst:
        assert c["may"][dst] and c["runs"][c["model"][row], dst]
        left, rate = c["room"][dst] - c["size"][row], c["growth"][dst] + c["grow"][row]
        assert left >= 0 and left >= rate


def test_of_many_requests_some_of_every_size_are_looked_at():
    c = cluster(0, n=200)
    c["room"][:], c["may"][:], c["runs"][:] = 1e3, True, True
    c["room"][2], c["may"][2] = 0.0, False
    for price, rank in ((0.0, "max"), (10.0, "min")):
        row, _ = relief(
            c["size"],
            c["grow"] * 0,
            c["model"],
            c["runs"],
            c["room"],
            c["growth"],
            c["leaving"],
            c["may"],
            2,
            0.0,
            price,
            0.0,
            PAR,
        )
        assert c["size"][row] == pytest.approx(getattr(c["size"], rank)(), abs=2.0)


@pytest.mark.parametrize("seed", range(50))
def test_a_worker_is_emptied_wholly_or_nothing_changes(seed):
    c, twin = cluster(seed, n=3), cluster(seed, n=3)
    dst, dst_twin = np.zeros(3, np.int64), np.zeros(3, np.int64)

    def run(kernel, c, dst):
        return kernel(
            c["size"],
            c["grow"],
            c["model"],
            c["runs"],
            c["room"],
            c["growth"],
            c["leaving"],
            c["seats"],
            c["may"],
            0,
            0.05,
            0.01,
            1.0,
            PAR,
            dst,
        )

    before = {k: v.copy() for k, v in c.items()}
    done = run(emptied, c, dst)
    assert done == run(emptied.py_func, twin, dst_twin)
    for name in c:
        np.testing.assert_allclose(c[name], twin[name])
    if done:
        assert (dst > 0).all() and (dst == dst_twin).all() and (c["seats"] >= 0).all()
        assert c["room"].sum() == pytest.approx(before["room"].sum() - c["size"].sum())
    else:
        for name in ("room", "growth", "leaving", "seats"):
            np.testing.assert_allclose(c[name], before[name])


def test_a_worker_is_not_emptied_where_that_strains_the_others_more():
    def empties(left_s, price=0.0):
        room = np.array([0.0, 100.0, 40.0 + left_s * 2])
        growth, leaving = np.array([0.0, 1.0, 1.0]), np.zeros(3)
        return emptied(
            np.array([40.0]),
            np.ones(1),
            np.zeros(1, np.int64),
            np.ones((1, 3), np.bool_),
            room,
            growth,
            leaving,
            np.ones(3, np.int64),
            np.array([False, False, True]),
            1,
            0.0,
            price,
            0.0,
            PAR,
            np.zeros(1, np.int64),
        )

    assert empties(math.inf) and empties(8.0) and not empties(0.5)
    assert not empties(8.0, price=0.05)


def test_warming_up_compiles_every_kernel():
    warm_up()
    compiled = [k for k in vars(kernels).values() if hasattr(k, "py_func")]
    assert compiled and all(kernel.signatures for kernel in compiled)


@pytest.mark.parametrize("seed", range(30))
def test_of_all_moves_a_relief_is_the_one_that_leaves_least_strain(seed):
    c = cluster(seed)
    c["room"][2], c["may"][2], price, leave = 3.0, False, 0.05, 0.01

    def strains(moved=None, dst=0):
        total = 0.0
        for w in (2, dst) if dst else ():
            sign = -1 if w == 2 else 1
            grown = c["growth"][w] + sign * c["grow"][moved]
            left = c["room"][w] - sign * c["size"][moved]
            total += strain(left, max(grown, 0.0), c["leaving"][w] + sign * leave, PAR)
            total -= 0 if w == 2 else strain(c["room"][w], c["growth"][w], c["leaving"][w], PAR)
        return total + price * c["size"][moved]

    found = {
        (i, w): strains(i, w)
        for i in range(5)
        for w in range(1, 6)
        if c["may"][w]
        and c["runs"][c["model"][i], w]
        and c["room"][w] - c["size"][i] >= c["growth"][w] + c["grow"][i]
    }
    row, dst = relief(
        c["size"],
        c["grow"],
        c["model"],
        c["runs"],
        c["room"],
        c["growth"],
        c["leaving"],
        c["may"],
        2,
        leave,
        price,
        1.0,
        PAR,
    )
    assert (row, dst) in found if found else dst == 0
    if found:
        assert found[row, dst] == pytest.approx(min(found.values()))


@pytest.mark.parametrize("seed", range(20))
def test_each_request_that_is_emptied_sees_what_those_before_it_have_taken(seed):
    rng = np.random.default_rng(seed)
    room, growth = rng.uniform(40, 90, 5), rng.uniform(1, 9, 5)
    size, dst = np.array([12.0, 9.0, 9.0, 5.0]), np.zeros(4, np.int64)
    expected, now, rate = [], room.copy(), growth.copy()
    for need in size:
        added = [
            strain(now[w] - need, rate[w] + 1, 0.0, PAR) - strain(now[w], rate[w], 0.0, PAR)
            for w in range(2, 5)
        ]
        best = 2 + int(np.argmin(added))
        now[best], rate[best] = now[best] - need, rate[best] + 1
        expected.append(best)
    emptied(
        size,
        np.ones(4),
        np.zeros(4, np.int64),
        np.ones((1, 5), np.bool_),
        room,
        growth,
        np.zeros(5),
        np.full(5, 9),
        np.arange(5) > 1,
        1,
        0.0,
        0.0,
        0.0,
        PAR,
        dst,
    )
    assert dst.tolist() == expected
