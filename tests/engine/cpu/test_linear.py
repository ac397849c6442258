"""Linear layers: equal to torch, the same bits for any batch and any number of threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numba import njit

from mellmpi.engine.cpu.linear import ADD, GATE_UP, KC, NEVER, STORE, WIDENED_ELEMENTS, linear
from mellmpi.engine.cpu.packed_weights import NR, activations, interleaved, packed, pad_to
from mellmpi.engine.cpu.parallel_for import KERNEL, thread_group
from mellmpi.engine.cpu.shapes import Matrix
from mellmpi.engine.cpu.tuning import FEW, MANY, crossing, widen_from
from tests.engine.cpu.stored import empty, values

K, STRIDE, WIDTH = KC + 96, KC + 112, 160


@njit(**KERNEL)
def run(threads, a, rows, w, begins, bias, out, inner, widen_from):
    """Store the first matrix's product, add the second's, gate the third's."""
    buffer = np.empty(WIDENED_ELEMENTS, np.float32)
    for index in range(3):
        matrix = Matrix(begins[index], index * WIDTH, K, WIDTH // NR, widen_from)
        if index < 2:
            how = ADD if index else STORE
            linear(threads, index, a, STRIDE, rows, w, bias, matrix, how, out, WIDTH, buffer)
        else:
            linear(
                threads, index, a, STRIDE, rows, w, bias, matrix, GATE_UP, inner, WIDTH // 2, buffer
            )


class Layer:
    """Three matrices, and the uses of their products."""

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

    def run(self, rows, threads=1, start=None):
        """start: rows from which weights are widened; None: as measured on this CPU."""
        out = np.zeros((rows, WIDTH), np.float32)
        inner = empty((rows, WIDTH // 2), self.dtype)
        group, _counters = thread_group(3, threads)
        arguments = (
            group,
            activations(pad_to(self.x[:rows], rows, STRIDE)).ravel(),
            rows,
            self.w,
            self.begins,
            self.bias.numpy(),
            out.ravel(),
            inner.ravel(),
            widen_from(self.dtype) if start is None else start,
        )
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(run, *arguments) for _ in range(threads)]:
                done.result()
        return torch.from_numpy(out), values(inner, self.dtype)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def layer(request):
    return Layer(request.param)


def test_products_equal_those_of_torch_in_double_precision(layer):
    out, inner = layer.run(37)
    x, bias = layer.x[:37].double(), layer.bias.double().view(3, WIDTH)
    expected = sum(x @ m.double().T + b for m, b in zip(layer.matrices, bias, strict=False))
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-4)
    halves = bias[2].view(-1, 2, 16)
    gate = x @ layer.gate.double().T + halves[:, 0].flatten()
    up = x @ layer.up.double().T + halves[:, 1].flatten()
    gated = torch.nn.functional.silu(gate) * up
    tolerance = 1e-4 if layer.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(inner.double(), gated, atol=1e-4, rtol=tolerance)


@pytest.mark.parametrize("rows", [1, 2, 7, 14, 15, 32, 100, 699])
def test_a_row_has_the_same_bits_in_any_batch(layer, rows):
    whole, part = layer.run(700), layer.run(rows)
    assert all(torch.equal(w[:rows], p) for w, p in zip(whole, part, strict=True))


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 97, 200])
def test_widened_weights_give_the_same_bits(layer, rows):
    """A CPU that multiplies bfloat16 never widens weights."""
    plain, widened = layer.run(rows, start=NEVER), layer.run(rows, start=1)
    assert all(torch.equal(p, w) for p, w in zip(plain, widened, strict=True))


def test_weights_are_widened_from_the_rows_where_it_is_faster():
    assert crossing(few=3.0, many=1.0) == NEVER and crossing(few=-1.0, many=-9.0) == FEW
    assert crossing(few=1.0, many=-1.0) == (FEW + MANY) // 2
    assert FEW < crossing(few=0.1, many=-1.0) < crossing(few=1.0, many=-0.1) < MANY


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_does_not_change_a_bit(layer, threads):
    alone, together = layer.run(100), layer.run(100, threads)
    assert all(torch.equal(a, t) for a, t in zip(alone, together, strict=True))
