"""A config.json with a wrong value is refused by the name of its key."""

import json

import pytest

from mellmpi.models import Architecture, resolve
from tests.models.refusals import assert_matches, change_config, refusal

NONSENSE = ("64", -1, 0, 1.5, float("nan"), True, [64], {"a": 1}, 10**30)


@pytest.mark.parametrize(
    "key",
    [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
        "head_dim",
    ],
)
@pytest.mark.parametrize("value", NONSENSE)
def test_a_size_is_a_whole_number_above_zero(model, key, value):
    said = refusal(change_config(model, **{key: value}))
    assert said.startswith(f"{model / 'config.json'}: {key} must be a whole number from 1 to")


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", ["1", -1, 0, float("nan"), float("inf"), True, [1], 10**400])
def test_a_number_is_finite_and_above_zero(model, key, value):
    said = refusal(change_config(model, **{key: value}))
    assert said.startswith(f"{model / 'config.json'}: {key} must be a number from")


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", ["false", 1, []])
def test_a_flag_is_true_or_false(model, key, value):
    assert f"config.json: {key} must be true or false" in refusal(
        change_config(model, **{key: value})
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": ...}, r"lacks num_hidden_layers"),
        ({"num_hidden_layers": None}, r"num_hidden_layers must be a whole number .*, not None"),
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers must be .* to 10000, not 1000000"),
        ({"num_attention_heads": 3}, r"hidden_size \(16\) is not a multiple"),
        ({"model_type": "gemma2"}, r"model_type 'gemma2' is not supported; supported are llama"),
        ({"model_type": ...}, r"model_type None is not supported; supported are llama"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        ({"model_type": "llava", "text_config": {"a": 1}}, r"multimodal model_type 'llava'"),
        ({"text_config": {"model_type": "llama"}}, r"multimodal model_type 'llama'"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)"),
        ({"quantization_config": "awq"}, r"quantization_config must be an object"),
        ({"compression_config": {"format": "x"}}, r"quantised \(unknown\)"),
        ({"rope_scaling": "linear"}, r"rope_scaling must be an object"),
        ({"rope_scaling": {"factor": 8.0}}, r"has no rope_type that scales"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1}}}, r"has no rope_type"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope type \['linear'\] is not"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "8"}}, r"factor must be a number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, r"factor must be a number"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            r"needs low_freq_factor < high_freq_factor",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8, "beta_fast": [32]}},
            r"beta_fast must be a number",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 8, "truncate": "no"}},
            r"truncate must be true or false",
        ),
        ({"rope_theta": 1.0}, r"rope_theta must be a number from 1.001"),
        ({"bos_token_id": "1"}, r"bos_token_id must be a token id or null, not '1'"),
        ({"model_type": "mistral", "sliding_window": "8"}, r"sliding_window must be a whole"),
        ({"model_type": "mistral", "sliding_window": 0}, r"sliding_window must be a whole"),
    ],
)
def test_an_invalid_config_is_refused_by_its_key(model, changes, said):
    assert_matches(rf"^{model / 'config.json'}: .*{said}", refusal(change_config(model, **changes)))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", -1, 300, [2, "3"], [2, 300], True, 2.0, {"a": 2}])
def test_end_tokens_are_ids_of_the_vocabulary(model, file, value):
    given = json.loads((model / file).read_text()) | {"eos_token_id": value}
    (model / file).write_text(json.dumps(given))
    said = refusal(model)
    assert said.startswith(f"{model / file}: eos_token_id must be token ids from 0 to 299")


@pytest.mark.parametrize("value", [..., None, []])
def test_end_tokens_may_be_absent_or_null(model, value):
    change_config(model, eos_token_id=value)
    (model / "generation_config.json").write_text(
        json.dumps({} if value is ... else {"eos_token_id": value})
    )
    assert resolve(str(model), model.parent / "cache") == model
    assert Architecture.from_directory(model).eos_ids == ()
