"""Loaded weights equal the stored ones, and errors name wrong weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mellmpi.engine.weights import load
from mellmpi.models import Architecture, parameter_shapes, resolve
from mellmpi.models.random_model import NAMED
from tests.models import gguf_files as files

SOME = "model.layers.1.mlp.up_proj.weight"
KNOWN = [0.01512570958584547, -0.007347399368882179, 0.017664005979895592]


@pytest.fixture
def saved(tmp_path):
    """(family, **changes) -> (directory as save_pretrained writes it, the model)."""

    def save(family="llama", shard="5GB", dtype=torch.float32, **changes):
        model = files.tiny(family, **changes).to(dtype)
        model.save_pretrained(tmp_path, max_shard_size=shard)
        return tmp_path, model

    return save


def change(directory, edit):
    file = directory / "model.safetensors"
    weights = load_file(file)
    edit(weights)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, file)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_loaded_weights_equal_those_that_transformers_saved(saved, family, tied):
    directory, model = saved(family, tie_word_embeddings=tied)
    arch, weights = load(directory, torch.float32, "cpu")
    state = model.state_dict()
    assert arch == Architecture.from_hf(model.config.to_dict())
    assert weights.keys() == parameter_shapes(arch).keys()
    assert ("lm_head.weight" in weights) != tied
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.items())


def test_shards_are_read_by_their_index(saved):
    directory, model = saved(shard="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    _, weights = load(directory, torch.float32, "cpu")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())
    next(iter(directory.glob("*.safetensors"))).unlink()
    with pytest.raises(
        ValueError, match=r"lacks model-0000\d-of-.*: 1 of \d+ weight files are missing"
    ):
        load(directory, torch.float32, "cpu")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_requested_dtype(saved, stored, dtype):
    directory, model = saved(dtype=stored)
    _, weights = load(directory, dtype, "cpu")
    assert torch.equal(weights[SOME], model.state_dict()[SOME].to(dtype))
    assert {tensor.dtype for tensor in weights.values()} == {dtype}


def test_names_without_prefix_and_old_buffers_are_understood(saved):
    directory, model = saved()

    def edit(weights):
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)
        weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    change(directory, edit)
    _, weights = load(directory, torch.float32, "cpu")
    assert torch.equal(weights[SOME], model.state_dict()[SOME])


def test_a_stored_copy_of_tied_embeddings_is_dropped(saved):
    directory, _ = saved(tie_word_embeddings=True)
    change(directory, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    assert "lm_head.weight" not in load(directory, torch.float32, "cpu")[1]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda w: w.pop(SOME), rf"1 missing \({SOME}\)"),
        (lambda w: w.update({"model.extra": torch.zeros(1)}), r"1 unexpected \(model\.extra\)"),
        (
            lambda w: w.update({SOME: torch.zeros(4, 5)}),
            r"up_proj.weight \[4, 5\] instead of \[96, 64\]",
        ),
        (
            lambda w: w.clear() or w.update({"x": torch.zeros(1)}),
            r"21 missing .*, …\); 1 unexpected",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(saved, edit, said):
    directory, _ = saved()
    change(directory, edit)
    with pytest.raises(ValueError, match=said):
        load(directory, torch.float32, "cpu")


def test_a_directory_without_weights_is_no_random_model(saved):
    directory, _ = saved()
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no \.safetensors file"):
        load(directory, torch.float32, "cpu")


@pytest.mark.parametrize("name", NAMED)
def test_random_weights_are_the_seeds_and_nothing_elses(tmp_path, name):
    directory = resolve(f"random:{name}", tmp_path)
    arch, weights = load(directory, torch.float32, "cpu", seed=5)
    again = load(directory, torch.float32, "cpu", seed=5)[1]
    other = load(directory, torch.float32, "cpu", seed=6)[1]
    assert weights.keys() == parameter_shapes(arch).keys()
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert not any(torch.equal(weights[key], other[key]) for key in weights)
    assert {key: tuple(value.shape) for key, value in weights.items()} == parameter_shapes(arch)


def test_random_weights_have_known_values(tmp_path):
    directory = resolve("random:tiny-llama", tmp_path)
    weights = load(directory, torch.float32, "cpu", seed=0)[1]
    assert weights[SOME].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["model.norm.weight"].mean().item() == pytest.approx(1, abs=0.02)
    # These values must never change: a resumed job needs the same model.
    assert weights[SOME][0, :3].tolist() == pytest.approx(KNOWN, abs=1e-9)


def test_a_random_model_has_the_sizes_of_its_config_json(tmp_path):
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps({**NAMED["tiny-llama"], "num_hidden_layers": 1}))
    arch, weights = load(resolve(f"random:{shape}", tmp_path / "c"), torch.bfloat16, "cpu")
    assert arch.num_layers == 1 and weights["lm_head.weight"].dtype == torch.bfloat16
