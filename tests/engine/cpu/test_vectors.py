"""Vectors of sixteen lanes: each operation against numpy, and sums always in one order."""

import numpy as np
import pytest
import torch
from numba import njit

from mellmpi.engine.cpu.memory import element, load, store
from mellmpi.engine.cpu.packed_weights import storage
from mellmpi.engine.cpu.vectors import LANES, exp2, fill, fma, inside, larger, largest, total


@njit
def copy(source, target):
    for i in range(0, len(source), LANES):
        store(target, i, load(source, i))


@njit
def powers(x, out):
    for i in range(0, len(x), LANES):
        store(out, i, exp2(load(x, i)))


@njit
def arithmetic(x, y, out):
    a, b = load(x, 0), load(y, 0)
    store(out, 0, (a + b) * (a - b) / b)
    store(out, 16, fma(a, b, fill(np.float32(0.5))))
    store(out, 32, larger(a, b))
    store(out, 48, inside(a, 100, 103, 109, np.float32(-1)))


@njit
def reductions(x):
    return total(load(x, 0)), largest(load(x, 0)), element(x, 3)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_rounding_to_bfloat16_and_back_is_that_of_torch(rng):
    wide = (rng.standard_normal(4096) * 10.0 ** rng.integers(-30, 30, 4096)).astype(np.float32)
    wide[:3] = 1 + 2**-8, 1 + 3 * 2**-8, -0.0  # ties, both ways
    halves, back = np.zeros(4096, np.uint16), np.zeros(4096, np.float32)
    copy(wide, halves)
    copy(halves, back)
    expected = torch.from_numpy(wide).bfloat16()
    assert np.array_equal(halves, storage(expected))
    assert np.array_equal(back, expected.float().numpy())


def test_powers_of_two_are_exact_to_a_few_units_in_the_last_place(rng):
    x = np.concatenate([rng.uniform(-125, 125, 4080), np.arange(-8, 8)]).astype(np.float32)
    out = np.zeros_like(x)
    powers(x, out)
    np.testing.assert_allclose(out, np.exp2(x.astype(np.float64)), rtol=3e-7)
    assert np.array_equal(out[-16:], 2.0 ** np.arange(-8, 8))


def test_the_power_of_a_masked_score_is_exactly_zero():
    x, out = np.full(16, -np.inf, np.float32), np.ones(16, np.float32)
    x[0] = -127
    powers(x, out)
    assert (out == 0).all()


def test_arithmetic_is_lane_by_lane(rng):
    x, y = (rng.standard_normal(16).astype(np.float32) for _ in range(2))
    out = np.zeros(64, np.float32)
    arithmetic(x, y, out)
    assert np.array_equal(out[:16], (x + y) * (x - y) / y)
    exact = (x.astype(np.float64) * y + 0.5).astype(np.float32)
    assert np.array_equal(out[16:32], exact)
    assert np.array_equal(out[32:48], np.maximum(x, y))
    at = np.arange(100, 116)
    assert np.array_equal(out[48:], np.where((at >= 103) & (at <= 109), x, -1))


def test_reductions_see_every_lane(rng):
    for lane in range(16):
        x = np.zeros(16, np.float32)
        x[lane] = 7
        assert reductions(x)[:2] == (7, 7)
    x = rng.standard_normal(16).astype(np.float32)
    added, top, fourth = reductions(x)
    assert abs(added - x.sum()) < 1e-5 and top == x.max() and fourth == x[3]
    halves = storage(torch.from_numpy(x).bfloat16())
    assert reductions(halves)[2] == torch.from_numpy(x).bfloat16()[3].item()
