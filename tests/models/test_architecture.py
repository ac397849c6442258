"""Architectures against transformers: configurations and rotary frequencies."""

import dataclasses
import json

import numpy as np
import pytest

from mellmpi.models import Architecture, attention_factor, inv_freq

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 3.0},
    {"type": "linear", "factor": 2.5},
    LLAMA3,
    {**LLAMA3, "factor": 32.0},
    YARN,
    {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {**YARN, "mscale": 0.9, "mscale_all_dim": 0.7},
    {**YARN, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": 2.0},
]


def config(**changes):
    return {"model_type": "llama", **SMALL, **changes}


def reference(given):
    """transformers' rotary embedding for the same config.json."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(AutoConfig.for_model(**json.loads(json.dumps(given))))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("theta", "head_dim"), [(10000.0, 64), (500000.0, 128), (1e6, 16)])
def test_rotary_frequencies_equal_transformers(scaling, theta, head_dim):
    given = config(rope_theta=theta, head_dim=head_dim, rope_scaling=scaling)
    arch, theirs = Architecture.from_hf(given), reference(given)
    assert inv_freq(arch).dtype == np.float32
    np.testing.assert_allclose(inv_freq(arch), theirs.inv_freq.numpy(), rtol=4e-7)
    assert attention_factor(arch) == pytest.approx(theirs.attention_scaling, abs=1e-12)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_keys_of_transformers_4_and_5_are_equivalent(scaling):
    old = Architecture.from_hf(config(rope_theta=5e5, rope_scaling=scaling))
    new = Architecture.from_hf(config(rope_parameters={"rope_theta": 5e5, **(scaling or {})}))
    assert old == new and old.rope_theta == 5e5


def test_a_top_level_original_context_overrides_that_of_the_scaling():
    given = config(
        rope_theta=1e4, head_dim=64, rope_scaling=YARN, original_max_position_embeddings=512
    )
    arch = Architecture.from_hf(given)
    assert arch.rope_scaling["original_max_position_embeddings"] == 512
    np.testing.assert_allclose(inv_freq(arch), reference(given).inv_freq.numpy(), rtol=4e-7)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_an_architecture_equals_the_one_read_from_its_config_json(family):
    arch = Architecture.from_hf(config(model_type=family, rope_scaling=LLAMA3, rope_theta=5e5))
    assert Architecture.from_hf(json.loads(json.dumps(arch.to_hf()))) == arch


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_equal_those_of_transformers(family, bias):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = config(model_type=family, attention_bias=bias, mlp_bias=bias, head_dim=32)
    arch = Architecture.from_hf(given)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    names = {name for name, _ in theirs.named_parameters()}
    layer = "model.layers.0."
    assert arch.qkv_bias == (f"{layer}self_attn.q_proj.bias" in names)
    assert arch.o_bias == (f"{layer}self_attn.o_proj.bias" in names)
    assert arch.mlp_bias == (f"{layer}mlp.up_proj.bias" in names)
    assert arch.qk_norm == (f"{layer}self_attn.q_norm.weight" in names)
    assert arch.tie_embeddings == theirs.config.tie_word_embeddings
    assert arch.max_position == theirs.config.max_position_embeddings


def test_defaults_of_absent_keys_equal_those_of_transformers():
    from transformers import AutoConfig

    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        given = {"model_type": family, "vocab_size": 128, **{key: SMALL[key] for key in keys}}
        arch, theirs = Architecture.from_hf(given), AutoConfig.for_model(**given)
        head_dim = getattr(theirs, "head_dim", None) or 64 // 4
        assert arch.head_dim == head_dim
        assert arch.max_position == theirs.max_position_embeddings
        assert arch.rms_norm_eps == theirs.rms_norm_eps
        assert arch.rope_theta == theirs.rope_parameters["rope_theta"]


def test_a_sliding_window_is_on_every_layer_or_refused():
    window = Architecture.from_hf(config(model_type="mistral", sliding_window=1024))
    assert window.sliding_window == 1024
    assert Architecture.from_hf(json.loads(json.dumps(window.to_hf()))) == window
    assert (
        Architecture.from_hf(config(model_type="mistral", sliding_window=None)).sliding_window
        is None
    )
    assert (
        Architecture.from_hf(config(model_type="mistral", sliding_window=4096)).sliding_window
        is None
    )
    qwen = config(model_type="qwen2", sliding_window=512, max_window_layers=1)
    assert Architecture.from_hf(qwen).sliding_window is None
    with pytest.raises(ValueError, match="max_window_layers 1"):
        Architecture.from_hf({**qwen, "use_sliding_window": True})
    whole = Architecture.from_hf({**qwen, "use_sliding_window": True, "max_window_layers": 0})
    assert whole.sliding_window == 512
    assert Architecture.from_hf(json.loads(json.dumps(whole.to_hf()))) == whole


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported are llama, mistral"),
        ({"model_type": None}, "supported are llama"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "supported are default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised \\(awq\\)"),
        ({"hidden_act": "gelu"}, "supported is silu"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 15}, "must be even"),
    ],
)
def test_an_unsupported_model_is_refused_with_what_is_supported(changes, said):
    with pytest.raises(ValueError, match=said):
        Architecture.from_hf(config(**changes))


def test_a_config_without_a_size_is_refused_by_its_key():
    given = config()
    del given["intermediate_size"]
    with pytest.raises(ValueError, match="lacks intermediate_size"):
        Architecture.from_hf(given)


def test_end_tokens_of_the_generation_config_are_added(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config(eos_token_id=2)))
    assert Architecture.from_directory(tmp_path).eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7, 9]}))
    assert Architecture.from_directory(tmp_path).eos_ids == (2, 7, 9)


def test_an_architecture_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Architecture.from_hf(config()).num_layers = 3
