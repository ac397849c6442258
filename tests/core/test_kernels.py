"""The compiled kernels of `frugal` against their own Python, on random clusters."""

import numpy as np
import pytest

from mellmpi.core.policies.kernels import emptied, relief, tightest, warm_up


def cluster(seed):
    rng = np.random.default_rng(seed)
    workers, n = 6, 5
    return {
        "room": rng.uniform(-5, 40, workers), "growth": rng.uniform(0, 5, workers),
        "may": rng.random(workers) < 0.7, "size": np.sort(rng.uniform(1, 20, n))[::-1].copy(),
        "grow": rng.uniform(0, 2, n), "hosts": rng.random((n, workers)) < 0.8,
        "seats": rng.integers(0, 4, workers),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(50))
def test_the_tightest_place_is_that_of_the_python_twin_and_keeps_its_time(seed):
    c = cluster(seed)
    args = (c["room"], c["growth"], c["may"], 6.0, 1.0, 2.0)
    found = tightest(*args)
    assert found == tightest.py_func(*args)
    left_s = (c["room"] - 6) / (c["growth"] + 1)
    fits = [w for w in range(1, 6) if c["may"][w] and c["room"][w] >= 6 and left_s[w] >= 2]
    assert found == (min(fits, key=lambda w: left_s[w]) if fits else 0)


@pytest.mark.parametrize("seed", range(50))
def test_a_relief_is_that_of_the_python_twin_and_fits(seed):
    c = cluster(seed)
    c["may"][2] = False
    rows = np.arange(5)
    args = (rows, c["size"], c["grow"], c["hosts"], c["room"], c["growth"], c["may"], 2, 40.0, 1.0,
            (4.0, 0.7, 1.9, 15.0))  # fmt: skip
    row, dst = relief(*args)
    assert (row, dst) == relief.py_func(*args)
    assert (row == -1) == (dst == 0)
    if dst:
        assert c["may"][dst] and c["hosts"][row, dst] and c["room"][dst] >= c["size"][row]


@pytest.mark.parametrize("seed", range(50))
def test_a_worker_is_emptied_wholly_or_nothing_changes(seed):
    c, twin = cluster(seed), cluster(seed)
    dst, dst_twin = np.zeros(5, np.int64), np.zeros(5, np.int64)

    def run(kernel, c, dst):
        return kernel(c["size"], c["grow"], c["hosts"], c["room"], c["growth"], c["seats"],
                      c["may"], 1.0, dst)  # fmt: skip

    before = {k: v.copy() for k, v in c.items()}
    done = run(emptied, c, dst)
    assert done == run(emptied.py_func, twin, dst_twin)
    for name in c:
        np.testing.assert_allclose(c[name], twin[name])
    if done:
        assert (dst > 0).all() and (dst == dst_twin).all() and (c["seats"] >= 0).all()
        assert c["room"].sum() == pytest.approx(before["room"].sum() - c["size"].sum())
    else:
        np.testing.assert_allclose(c["room"], before["room"])
        assert (c["seats"] == before["seats"]).all()


def test_warming_up_compiles_every_kernel():
    warm_up()
    assert tightest.signatures and relief.signatures and emptied.signatures
