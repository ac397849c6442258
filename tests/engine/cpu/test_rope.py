"""The RoPE table: equal to transformers at each position, however the table grew."""

import numpy as np
import pytest

from mellmpi.engine.cpu.rope import SEGMENT, RopeTable
from mellmpi.models import Architecture, attention_factor, inv_freq

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def architecture(head_dim, scaling):
    return Architecture(
        family="llama",
        num_layers=1,
        hidden_size=64,
        num_heads=2,
        num_kv_heads=2,
        head_dim=head_dim,
        intermediate_size=64,
        vocab_size=64,
        max_position=8192,
        rope_theta=1e4,
        rope_scaling=scaling,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        bos_id=1,
        eos_ids=(2,),
    )


@pytest.mark.parametrize(("head_dim", "half"), [(64, 32), (48, 32), (16, 16)])
@pytest.mark.parametrize("scaling", [None, YARN])
def test_every_position_has_its_cosines_and_sines(head_dim, half, scaling):
    arch = architecture(head_dim, scaling)
    table = RopeTable(arch).up_to(3 * SEGMENT + 1).reshape(-1, 2, half)
    positions = np.arange(len(table), dtype=np.float32)
    angles = positions[:, None] * inv_freq(arch)
    for found, function in zip((table[:, 0], table[:, 1]), (np.cos, np.sin), strict=True):
        expected = function(angles.astype(np.float64)) * attention_factor(arch)
        np.testing.assert_allclose(found[:, : head_dim // 2], expected, atol=2e-7)
        assert not found[:, head_dim // 2 :].any()


def test_growth_does_not_change_earlier_positions():
    grown, at_once = RopeTable(architecture(64, None)), RopeTable(architecture(64, None))
    for num_positions in (1, SEGMENT, SEGMENT + 1, 5 * SEGMENT):
        grown.up_to(num_positions)
    found, expected = (table.up_to(5 * SEGMENT) for table in (grown, at_once))
    assert len(found) >= 5 * SEGMENT * 64 and np.array_equal(found, expected)
