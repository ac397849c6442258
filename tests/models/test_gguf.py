"""GGUF conversion against transformers' loading of the same file, and the original models."""

import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, dequantize
from transformers import AutoModelForCausalLM

from mellmpi.engine.weights import load
from mellmpi.models.checkpoint import _smollm2_file
from mellmpi.models.gguf import convert
from tests.models import gguf_files as files
from tests.models.gguf_files import converted


@pytest.fixture(scope="module")
def reference():
    """The demo model's file loaded by transformers, float32."""
    file = _smollm2_file()
    return AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    ).eval()


def test_every_weight_of_the_demo_model_equals_that_of_transformers_bit_for_bit(smollm2, reference):
    _, weights = load(smollm2, torch.float32, "cpu")
    theirs = reference.state_dict()
    assert theirs.keys() - weights.keys() == {"lm_head.weight"}  # tied
    for name, tensor in weights.items():
        assert torch.equal(tensor, theirs[name]), name


def test_logits_of_the_converted_directory_equal_those_of_the_file(smollm2, reference):
    ours = AutoModelForCausalLM.from_pretrained(str(smollm2), dtype=torch.float32).eval()
    tokens = torch.randint(49152, (2, 80), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(ours(tokens).logits, reference(tokens).logits)


def test_the_demo_model_has_the_shape_that_its_card_states(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    stated = {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "head_dim": 64,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2],
    }
    assert {key: config[key] for key in stated} == stated


# --- other models --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", dict(tie_word_embeddings=True)),
        ("llama", dict(tie_word_embeddings=False, num_key_value_heads=4)),
        ("llama", dict(attention_bias=True, mlp_bias=True)),
        ("qwen2", dict(tie_word_embeddings=True)),
        ("qwen2", dict(tie_word_embeddings=False)),
        ("qwen3", dict(head_dim=32)),
    ],
)
def test_a_model_converted_from_gguf_equals_the_original(tmp_path, family, changes):
    model = files.tiny(family, **changes)
    target = converted(tmp_path, model)
    arch, weights = load(target, torch.float32, "cpu")
    state = model.state_dict()
    assert arch.family == family
    assert arch.tie_embeddings == bool(changes.get("tie_word_embeddings"))
    for name, tensor in weights.items():
        assert torch.equal(tensor, state[name]), name
    ours = AutoModelForCausalLM.from_pretrained(str(target), dtype=torch.float32).eval()
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.F16, Kind.BF16])
def test_quantised_weights_equal_those_of_the_gguf_package(tmp_path, kind):
    target = converted(tmp_path, files.tiny("qwen2"), kind=kind)
    stored = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.float32)
    from safetensors.torch import load_file

    name = "model.layers.1.mlp.down_proj.weight"
    assert load_file(target / "model.safetensors")[name].dtype == stored
    tensors = {t.name: t for t in GGUFReader(str(tmp_path / "tiny.gguf")).tensors}
    expected = dequantize(tensors["blk.1.ffn_down.weight"].data, kind).astype(np.float32)
    _, weights = load(target, torch.float32, "cpu")
    np.testing.assert_array_equal(weights[name].numpy(), expected)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0])
def test_interleaving_of_rows_is_undone_for_every_type(tmp_path, kind):
    model = files.tiny("llama")
    _, weights = load(converted(tmp_path, model, kind=kind), torch.float32, "cpu")
    for part in ("q_proj", "k_proj"):
        name = f"model.layers.0.self_attn.{part}.weight"
        assert (weights[name] - model.state_dict()[name]).abs().max() < 0.02


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_scaling_of_llama_3_is_recovered_from_its_divisors(tmp_path, factor):
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = files.tiny("llama", head_dim=64, rope_parameters=scaling, max_position_embeddings=16384)
    plain = 1 / 5e5 ** (np.arange(0, 64, 2) / 64)
    divisors = plain / model.model.rotary_emb.inv_freq.numpy()
    extra = [("add_key_length", 64), ("add_rope_dimension_count", 64)]
    target = converted(tmp_path, model, rope_freqs=divisors, extra=extra)
    config = json.loads((target / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {k: v for k, v in scaling.items() if k != "rope_theta"}
    with pytest.raises(ValueError, match=r"not those of Llama 3\.1"):
        converted(tmp_path, model, rope_freqs=divisors**1.1, extra=extra)


def test_yarn_and_linear_scaling_come_from_the_metadata(tmp_path):
    from gguf import RopeScalingType

    yarn = [
        ("add_rope_scaling_type", RopeScalingType.YARN),
        ("add_rope_scaling_factor", 4.0),
        ("add_rope_scaling_orig_ctx_len", 128),
    ]
    config = json.loads(
        (converted(tmp_path, files.tiny("qwen2"), extra=yarn) / "config.json").read_text()
    )
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    linear = [("add_rope_scaling_type", RopeScalingType.LINEAR), ("add_rope_scaling_factor", 2.0)]
    config = json.loads(
        (converted(tmp_path, files.tiny("llama"), extra=linear) / "config.json").read_text()
    )
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_stored_weights_begin_on_a_multiple_of_eight_bytes(tmp_path):
    """safetensors maps them into memory."""
    for num_layers in range(1, 5):
        target = converted(tmp_path, files.tiny("qwen2", num_hidden_layers=num_layers))
        with (target / "model.safetensors").open("rb") as stream:
            assert int.from_bytes(stream.read(8), "little") % 8 == 0


def test_every_end_token_that_the_file_names_is_used(tmp_path):
    target = converted(tmp_path, files.tiny("llama"), extra=[("add_eot_token_id", 0)])
    assert load(target, torch.float32, "cpu")[0].eos_ids == (2, 0)


def test_an_unknown_architecture_is_refused_with_what_is_supported(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="'mamba', which is not supported; supported are llama"):
        convert(tmp_path / "x.gguf", tmp_path, lambda text: None)
