"""Each fault of a model directory is refused by `resolve` with its file and what to do."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mellmpi.models import Architecture, attention_factor, inv_freq, resolve
from tests.engine import model_directories as models

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 25464248\n"
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture
def model(tmp_path) -> Path:
    return models.write_model(tmp_path / "m")


def refusal(directory: Path | str) -> str:
    """What `resolve` says of a directory; one line."""
    with pytest.raises(ValueError) as error:
        resolve(str(directory), Path(str(directory).removeprefix("random:")).parent / "cache")
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def change_config(directory: Path, **changes) -> Path:
    """Set keys of config.json; `...` removes one."""
    given = {**models.CONFIG, **changes}
    kept = {key: value for key, value in given.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def test_a_whole_model_is_served_from_where_it_is(model):
    assert resolve(str(model), model.parent / "cache") == model
    models.write_shards(model, 3)
    assert resolve(str(model), model.parent / "cache") == model


# --- any file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors", "chat_template.jinja"])
def test_a_pointer_names_itself_and_the_command_that_gets_the_file(model, name):
    (model / name).write_text(POINTER)
    assert refusal(model) == (
        f"{model / name} is a Git LFS pointer, not the file itself: run `git lfs pull` in {model}"
    )


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"\0" * 4096, "is empty"),
        (b'{"a": 1, "b', "is (not JSON or is )?cut short"),
        (b"<html>404</html>", "is not JSON"),
        (b"[1, 2]", "(must hold a JSON object|is not JSON)"),
        ('{"a": 1}'.encode("utf-16"), "is not (UTF-8|JSON)"),
    ],
)
def test_a_damaged_json_file_is_named(model, name, data, said):
    (model / name).write_bytes(data)
    assert_matches(rf"^{model / name} {said}", refusal(model))


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": "caf\xe9"}', "is not UTF-8 text .*: save it as UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "begins with a byte order mark: save it as UTF-8 without one"),
        ('{"a": 1}'.encode("utf-16-le"), "is not UTF-8 text .UTF-16 or UTF-32"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b"null", r"must hold a JSON object \{…\}, not None"),
    ],
)
def test_a_config_in_another_encoding_or_form_is_named(model, data, said):
    (model / "config.json").write_bytes(data)
    assert_matches(rf"config\.json {said}", refusal(model))


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors"])
def test_a_broken_link_is_named_with_its_target(model, name):
    (model / name).unlink()
    (model / name).symlink_to("../blobs/gone")
    assert f"{model / name} is a symbolic link to ../blobs/gone, which does not" in refusal(model)


@pytest.mark.parametrize("name", ["m", "m.gguf"])
def test_a_model_that_is_a_broken_link_is_named_with_its_target(tmp_path, name):
    (tmp_path / name).symlink_to("gone")
    assert f"{tmp_path / name} is a symbolic link to gone, which" in refusal(tmp_path / name)


def test_a_directory_in_place_of_a_file_is_named(model):
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    assert refusal(model) == f"cannot read {model / 'config.json'} (Is a directory)"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_directory_without_permission_is_named(model):
    model.chmod(0)
    assert "Permission denied" in refusal(model)
    model.chmod(0o755)


def test_the_name_of_a_path_cannot_break_the_line(tmp_path):
    model = models.write_model(tmp_path / "two\nlines")
    (model / "config.json").write_text("")
    assert r"two\nlines" in refusal(model)


# --- config.json ---------------------------------------------------------------------------------

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
def test_a_config_that_cannot_be_is_refused_by_its_key(model, changes, said):
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


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.bool_])
def test_weights_of_a_type_that_cannot_be_served_are_refused(model, dtype):
    weights = models.tensors()
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(dtype)
    save_file(weights, model / "model.safetensors")
    said = r"holds 'model.norm.weight' as '\w+'; supported are F32, BF16, F16, F64, and GGUF"
    assert_matches(said, refusal(model))


def test_missing_unexpected_and_misshaped_weights_are_named(model):
    weights = models.tensors()
    weights["model.extra"] = weights.pop("model.norm.weight")
    weights["model.embed_tokens.weight"] = np.zeros((301, 16), np.float32)
    save_file(weights, model / "model.safetensors")
    assert_matches(
        r"1 missing \(model\.norm\.weight\); 1 unexpected \(model\.extra\); 1 of another shape "
        r"\(model\.embed_tokens\.weight \[301, 16\] instead of \[300, 16\]\)",
        refusal(model),
    )


def test_a_cut_file_says_how_many_bytes_are_there_and_how_many_should_be(model):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    file.write_bytes(whole[:-100])
    present, expected = len(whole) - header - 100, len(whole) - header
    assert f"{file} is cut short: {present} bytes of weights are there, {expected} expected" in (
        refusal(model)
    )


@pytest.mark.parametrize("begun", ["", ".incomplete", ".part"])
def test_missing_shards_are_named_and_counted(model, begun):
    files = models.write_shards(model, 5)
    for file in files[1:4]:
        file.unlink()
        if begun:
            file.with_name(file.name + begun).touch()
    said = refusal(model)
    assert f"{model} lacks {files[1].name}, {files[2].name}, {files[3].name}: 3 of 5" in said
    assert ("(3 unfinished)" in said) == bool(begun)


def test_shards_without_an_index_are_found_by_their_names(model):
    files = models.write_shards(model, 3)
    (model / "model.safetensors.index.json").unlink()
    assert resolve(str(model), model.parent / "cache") == model
    files[0].unlink()
    assert f"lacks {files[0].name}: 1 of 3 weight files are missing" in refusal(model)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", 3, None]
)
def test_an_index_names_files_beside_it_only(model, name):
    models.write_shards(model, 2)
    index = {"weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_matches(r"index\.json names .*, which is no \.safetensors file beside", refusal(model))


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map_is_named(model, index):
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json has no weight_map" in refusal(model)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "M.from_pretrained('{m}').save_pretrained('{m}')"),
        ("consolidated.safetensors", "get the model in Hugging Face's format"),
        ("consolidated.00.pth", "get the model in Hugging Face's format"),
        ("adapter_model.safetensors", "merge it into its base model"),
        ("model.safetensors.part", "unfinished download (model.safetensors.part)"),
        ("model.Q8_0.gguf", "give the file, --model {m}/model.Q8_0.gguf"),
        ("notes.txt", "it holds no other weights, either"),
    ],
)
def test_a_model_in_another_format_is_told_how_to_become_one(model, name, said):
    (model / "model.safetensors").unlink()
    (model / name).touch()
    found = refusal(model)
    assert found.startswith(f"{model} has no .safetensors file; it ")
    assert said.format(m=model) in found


def test_an_adapter_names_its_base_model(model):
    (model / "config.json").unlink()
    (model / "adapter_model.safetensors").touch()
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "has no config.json" in refusal(model) and "'org/base'" in refusal(model)


# --- which directory -----------------------------------------------------------------------------


def test_a_directory_above_the_model_names_the_one_below(tmp_path):
    cached = tmp_path / "hub" / "models--some--model"
    snapshots = [models.write_model(cached / "snapshots" / revision) for revision in ("a1", "b2")]
    for above in (tmp_path / "hub", cached, cached / "snapshots"):
        assert f"give the one below it: {snapshots[0]}, {snapshots[1]}" in refusal(above)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("b2")
    assert refusal(cached).endswith(f"give the one below it: {snapshots[1]}")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_model_names_its_directory(model, name):
    assert refusal(model / name).endswith(f"is a file: give its directory, --model {model}")


def test_an_unknown_home_directory_is_refused(tmp_path):
    for path in ("~nobody-of-this-name/m", "random:~nobody-of-this-name/m"):
        with pytest.raises(ValueError, match=r"the home directory in .* cannot be found"):
            resolve(path, tmp_path)


# --- tokenizers ----------------------------------------------------------------------------------


def test_a_model_without_any_tokenizer_is_refused(model):
    (model / "tokenizer.json").unlink()
    assert f"{model} has no tokenizer.json: copy or download it" in refusal(model)
    (model / "vocab.json").write_text(POINTER)
    assert f"{model} has no tokenizer.json: copy or download it" in refusal(model)
    (model / "merges.txt").write_text("")
    assert f"{model / 'vocab.json'} is a Git LFS pointer" in refusal(model)
    (model / "vocab.json").write_text("{}")
    assert resolve(str(model), model.parent / "cache") == model


def test_a_sentencepiece_model_alone_needs_the_packages_that_convert_it(model):
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mellmpi.models.tokenizer_files.CONVERTERS", ("no-such-package", "numpy"))
        assert refusal(model).endswith("pip install no-such-package")
        patch.setattr("mellmpi.models.tokenizer_files.CONVERTERS", ("numpy",))
        assert resolve(str(model), model.parent / "cache") == model
    (model / "tokenizer.model").write_text(POINTER)
    assert "tokenizer.model is a Git LFS pointer" in refusal(model)
    (model / "tokenizer.model").write_text("IQ== 0\n")
    assert "tokenizer.model is not a SentencePiece model" in refusal(model)


# --- random: -------------------------------------------------------------------------------------


def test_a_fault_of_a_random_models_source_names_the_source(model):
    (model / "tokenizer.json").write_text(POINTER)
    assert f"{model / 'tokenizer.json'} is a Git LFS" in refusal(f"random:{model}")
    change_config(model, hidden_size="64")
    assert f"{model / 'config.json'}: hidden_size" in refusal(f"random:{model}")


def test_a_damaged_converted_directory_says_that_it_can_be_deleted(model):
    cache = model.parent / "cache"
    made = resolve(f"random:{model}", cache)
    (made / "tokenizer.json").write_text("")
    with pytest.raises(ValueError, match=rf"is empty.*\. Delete {made}, and it is made again"):
        resolve(f"random:{model}", cache)


# --- anything ------------------------------------------------------------------------------------

ANYTHING = st.sampled_from(
    [None, True, 0, -1, 1.5, 10**30, float("nan"), "", "x", [], [1], [None], {}, {"a": 1}, [[2]]]
)


def damage(file: Path, draw: Callable) -> None:
    """Cut `file`, change some of its bytes, put something else in its place, or take it away."""
    whole, kind = file.read_bytes(), draw(st.sampled_from(["cut", "flip", "replace", "remove"]))
    if kind == "remove":
        file.unlink()
    elif kind == "replace":
        file.write_bytes(draw(st.sampled_from([b"", POINTER.encode(), b"[]", b"{}", b"\xff\xfe"])))
    elif kind == "cut":
        file.write_bytes(whole[: draw(st.integers(0, len(whole) - 1))])
    else:
        changed = bytearray(whole)
        for place in draw(st.lists(st.integers(0, min(len(whole), 2000) - 1), min_size=1)):
            changed[place] = draw(st.integers(0, 255))
        file.write_bytes(changed)


def rewrite(file: Path, draw: Callable) -> None:
    """Take a key out of a JSON file, or give it another value."""
    given = json.loads(file.read_bytes())
    key = draw(st.sampled_from([*given, "rope_scaling", "head_dim", "sliding_window"]))
    if draw(st.booleans()):
        given.pop(key, None)
    else:
        given[key] = draw(ANYTHING)
    file.write_text(json.dumps(given))


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_whatever_is_in_the_files_they_are_served_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    model = models.write_model(folder / "m")
    if data.draw(st.booleans()):
        models.write_shards(model, 2)
    whole = st.sampled_from(sorted(model.iterdir()))
    for file in data.draw(st.lists(whole, min_size=1, max_size=2, unique=True)):
        is_json = file.name in ("config.json", "generation_config.json")
        (rewrite if is_json and data.draw(st.booleans()) else damage)(file, data.draw)
    try:
        assert resolve(str(model), folder / "cache") == model
    except ValueError as error:
        assert str(folder) in str(error) and len(str(error).splitlines()) == 1
    else:
        inv_freq(Architecture.from_directory(model))
    shutil.rmtree(folder)


VALUES = st.one_of(ANYTHING, st.floats(1e-9, 1e9), st.integers(1, 10**9))
ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "llama3", "yarn", "default"])},
    optional=dict.fromkeys(
        [
            "factor",
            "rope_theta",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "original_max_position_embeddings",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "truncate",
        ],
        VALUES,
    ),
)


@settings(deadline=None, max_examples=1000)
@given(rope=ROPE, theta=VALUES)
def test_rotary_frequencies_of_every_accepted_config_are_finite(rope, theta):
    try:
        arch = Architecture.from_hf({**models.CONFIG, "rope_theta": theta, "rope_scaling": rope})
    except ValueError:
        return
    assert np.isfinite(inv_freq(arch)).all() and np.isfinite(attention_factor(arch))
