"""Packing: every weight at the place that the kernels read, padding zero."""

import numpy as np
import pytest
import torch

from mellmpi.engine.cpu.packed_weights import (
    NR,
    interleaved,
    packed,
    pad_to,
    padded,
    padded_stride,
    pair_of,
    storage,
    to_micro_panels,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_element_lies_at_its_micro_panel_step_column_and_half(dtype):
    matrix, pair = torch.arange(96 * 8).view(96, 8).to(dtype), pair_of(dtype)
    panels = to_micro_panels(matrix)
    for n, k in ((0, 0), (31, 7), (32, 1), (95, 6)):
        assert panels[n // NR, k // pair, n % NR, k % pair] == matrix[n, k]


def test_matrices_lie_one_after_the_other():
    matrices = [torch.randn(64, 16), torch.randn(32, 8)]
    memory, begins = packed(iter(matrices), [m.numel() for m in matrices])
    assert begins.tolist() == [0, 1024]
    assert np.array_equal(
        memory[1024:1280], to_micro_panels(matrices[1]).contiguous().numpy().ravel()
    )
    assert not memory[1280:].any()


def test_padding_is_zero_and_sizes_are_rounded_up():
    matrix = pad_to(torch.ones(3, 5), 4, 8)
    assert matrix.shape == (4, 8) and matrix.sum() == 15
    assert [padded(n) for n in (1, 32, 33)] == [32, 32, 64]


@pytest.mark.parametrize("width", [1, 576, 1024, 2048, 4100])
def test_a_padded_stride_is_an_odd_number_of_cache_lines(width):
    for itemsize in (2, 4):
        stride = padded_stride(width, itemsize)
        assert width <= stride < width + 128 // itemsize and stride * itemsize // 64 % 2 == 1


def test_gate_and_up_alternate_in_groups_of_sixteen():
    gate, up = torch.zeros(32, 4), torch.ones(32, 4)
    assert interleaved(gate, up)[:, 0].tolist() == ([0] * 16 + [1] * 16) * 2
    assert interleaved(gate[:, 0], up[:, 0]).tolist() == ([0] * 16 + [1] * 16) * 2


def test_bfloat16_is_seen_as_its_bits():
    assert storage(torch.tensor([1.0, -2.0]).bfloat16()).tolist() == [0x3F80, 0xC000]
