"""Linear layers: right against torch, the same bits for any batch and any number of threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numba import njit

from mellmpi.engine.cpu.linear import (
    ADD,
    GATE_UP,
    KEEP,
    NEVER,
    PART,
    WIDE_ELEMENTS,
    linear,
)
from mellmpi.engine.cpu.packed_weights import (
    PANEL,
    activations,
    interleaved,
    packed,
    pad_to,
)
from mellmpi.engine.cpu.parallel_for import KERNEL, team
from mellmpi.engine.cpu.tuning import FEW, MANY, crossing, wide_from
from tests.engine.cpu.stored import empty, values

K, STRIDE, WIDTH = PART + 96, PART + 112, 160


@njit(**KERNEL)
def run(team, a, rows, w, begins, bias, out, inner, wide_from):
    """Keeps the first matrix's product, adds the second's, gates the third's."""
    panels, wide = WIDTH // PANEL, np.empty(WIDE_ELEMENTS, np.float32)
    linear(
        team,
        0,
        a,
        STRIDE,
        rows,
        K,
        w,
        begins[0],
        panels,
        bias,
        0,
        KEEP,
        out,
        WIDTH,
        wide_from,
        wide,
    )
    linear(
        team,
        1,
        a,
        STRIDE,
        rows,
        K,
        w,
        begins[1],
        panels,
        bias,
        WIDTH,
        ADD,
        out,
        WIDTH,
        wide_from,
        wide,
    )
    linear(
        team,
        2,
        a,
        STRIDE,
        rows,
        K,
        w,
        begins[2],
        panels,
        bias,
        2 * WIDTH,
        GATE_UP,
        inner,
        WIDTH // 2,
        wide_from,
        wide,
    )


class Layer:
    """Three matrices and what becomes of their products, beside plain torch."""

    def __init__(self, dtype):
        generator = torch.Generator().manual_seed(3)
        self.dtype = dtype
        self.matrices = [torch.randn(WIDTH, K, generator=generator).to(dtype) for _ in range(2)]
        gate, up = (torch.randn(WIDTH // 2, K, generator=generator).to(dtype) for _ in range(2))
        self.gate, self.up = gate, up
        self.bias = torch.randn(3 * WIDTH, generator=generator)
        self.x = torch.randn(700, K, generator=generator).to(dtype)
        three = [*self.matrices, interleaved(gate, up)]
        self.w, self.begins = packed(iter(three), [m.numel() for m in three])

    def run(self, rows, threads=1, wide=None):
        """`wide`: rows from which weights are widened; None: as this CPU likes it."""
        out = np.zeros((rows, WIDTH), np.float32)
        inner = empty((rows, WIDTH // 2), self.dtype)
        shared, _counters = team(3, threads)
        arguments = (
            shared,
            activations(pad_to(self.x[:rows], rows, STRIDE)).ravel(),
            rows,
            self.w,
            self.begins,
            self.bias.numpy(),
            out.ravel(),
            inner.ravel(),
            wide_from(self.dtype) if wide is None else wide,
        )
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(run, *arguments) for _ in range(threads)]:
                done.result()
        return torch.from_numpy(out), values(inner, self.dtype)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def layer(request):
    return Layer(request.param)


def test_products_are_those_of_torch_in_double_precision(layer):
    out, inner = layer.run(37)
    x, bias = layer.x[:37].double(), layer.bias.double().view(3, WIDTH)
    expected = sum(x @ m.double().T + b for m, b in zip(layer.matrices, bias, strict=False))
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-4)
    turns = bias[2].view(-1, 2, 16)
    gate = x @ layer.gate.double().T + turns[:, 0].flatten()
    up = x @ layer.up.double().T + turns[:, 1].flatten()
    gated = torch.nn.functional.silu(gate) * up
    tolerance = 1e-4 if layer.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(inner.double(), gated, atol=1e-4, rtol=tolerance)


@pytest.mark.parametrize("rows", [1, 2, 7, 14, 15, 32, 100, 699])
def test_a_row_has_the_same_bits_in_any_batch(layer, rows):
    whole, part = layer.run(700), layer.run(rows)
    assert all(torch.equal(w[:rows], p) for w, p in zip(whole, part, strict=True))


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 97, 200])
def test_widened_weights_give_the_same_bits(layer, rows):
    """On a CPU that multiplies bfloat16 weights are never widened."""
    narrow, wide = layer.run(rows, wide=NEVER), layer.run(rows, wide=1)
    assert all(torch.equal(n, w) for n, w in zip(narrow, wide, strict=True))


def test_weights_are_widened_from_where_that_is_faster():
    assert crossing(few=3.0, many=1.0) == NEVER and crossing(few=-1.0, many=-9.0) == FEW
    assert crossing(few=1.0, many=-1.0) == (FEW + MANY) // 2
    assert FEW < crossing(few=0.1, many=-1.0) < crossing(few=1.0, many=-0.1) < MANY


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_work_and_not_the_sums(layer, threads):
    alone, together = layer.run(100), layer.run(100, threads)
    assert all(torch.equal(a, t) for a, t in zip(alone, together, strict=True))
