from dataclasses import replace

import pytest
import torch

from mellmpi.engine import KvArena, KvGeometry
from mellmpi.engine.kv_arena import with_equal_blocks
from mellmpi.protocol import ModelKv

GEOMETRY = KvGeometry(
    model="m", dtype=torch.bfloat16, num_layers=3, num_kv_heads=2, block_size=4, head_dim=6
)


@pytest.fixture
def arena():
    return KvArena(GEOMETRY, 7)


def test_a_block_holds_keys_and_values_of_all_layers():
    assert GEOMETRY.block_bytes == 3 * 2 * 2 * 4 * 6 * 2
    assert GEOMETRY.model_kv == ModelKv("m", 4, 576)


def test_a_block_is_contiguous_at_its_address(arena):
    assert arena.tensor.is_contiguous() and arena.tensor.shape == (7, 3, 2, 2, 4, 6)
    assert arena.tensor[5].data_ptr() == arena.address + 5 * arena.block_bytes
    assert arena.num_bytes == arena.tensor.nbytes


def test_a_blocks_bytes_are_the_tensors_bytes(arena):
    arena.tensor[2] = torch.randn(arena.tensor.shape[1:])
    copied = arena.block(2).clone().view(torch.bfloat16).view(arena.tensor.shape[1:])
    assert torch.equal(copied, arena.tensor[2])
    arena.block(6).copy_(arena.block(2))
    assert torch.equal(arena.tensor[6], arena.tensor[2])


def test_an_arena_begins_zeroed_and_on_a_page(arena):
    assert not arena.tensor.any() and arena.address % 4096 == 0


def test_an_arena_is_zeroed_before_other_streams_can_receive_into_it(monkeypatch):
    waited = []
    monkeypatch.setattr("mellmpi.engine.kv_arena.synchronize", waited.append)
    assert waited == [KvArena(GEOMETRY, 7).device]


def test_copies_move_whole_blocks_and_nothing_else(arena):
    arena.tensor.copy_(torch.randn(arena.tensor.shape))
    before = arena.tensor.clone()
    arena.copy_blocks([(1, 4), (3, 0)])
    expected = before[[3, 1, 2, 3, 1, 5, 6]]
    assert torch.equal(arena.tensor, expected)


def test_equal_layouts_have_equal_fingerprints():
    assert KvArena(GEOMETRY, 1).fingerprint == KvArena(replace(GEOMETRY), 9).fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"dtype": torch.float16},
        {"num_layers": 4},
        {"num_kv_heads": 3},
        {"block_size": 8},
        {"head_dim": 8},
        {"num_kv_heads": 4, "head_dim": 3},
        {"layout": "kernels"},
        {"slack": 2},
    ],
)
def test_any_other_layout_has_another_fingerprint(change):
    assert replace(GEOMETRY, **change).fingerprint != GEOMETRY.fingerprint


OTHER = replace(GEOMETRY, model="other", num_layers=1)
LONG = replace(GEOMETRY, model="long", num_layers=7)


def test_models_that_share_an_arena_have_blocks_of_equal_bytes():
    small, large = with_equal_blocks([OTHER, LONG])
    assert small.block_bytes == large.block_bytes == LONG.block_bytes
    assert large == LONG and small.block_size == 7 * OTHER.block_size and small.slack == 0


def test_the_remainder_is_slack_of_less_than_half_a_block():
    middle, large = with_equal_blocks([GEOMETRY, LONG])
    assert middle.block_size == 2 * GEOMETRY.block_size
    assert middle.slack == LONG.block_bytes - 2 * GEOMETRY.block_bytes > 0
    assert middle.block_bytes == large.block_bytes


def test_a_model_alone_has_no_slack():
    assert with_equal_blocks([GEOMETRY]) == [GEOMETRY]


def test_views_share_memory_in_different_shapes():
    middle, large = with_equal_blocks([GEOMETRY, LONG])
    arena = KvArena(large, 3)
    other = arena.view_as(middle)
    assert (other.address, other.num_blocks) == (arena.address, 3)
    assert other.tensor.shape == (3, 3, 2, 2, 8, 6)
    other.tensor[1] = 1.0
    assert not arena.tensor[0].any() and not arena.tensor[2].any()
    assert int(arena.tensor[1].sum()) == other.tensor[1].numel()
    assert other.tensor[2].data_ptr() == arena.address + 2 * arena.block_bytes


@pytest.mark.parametrize("change", [{"num_layers": 4}, {"dtype": torch.float16}])
def test_a_view_with_other_bytes_or_dtype_is_refused(change):
    with pytest.raises(ValueError, match="blocks of"):
        KvArena(GEOMETRY, 3).view_as(replace(GEOMETRY, **change))


def test_another_version_of_the_layout_has_another_fingerprint(monkeypatch):
    ours = GEOMETRY.fingerprint
    monkeypatch.setattr("mellmpi.engine.kv_arena.LAYOUT_VERSION", 999)
    assert replace(GEOMETRY).fingerprint != ours
