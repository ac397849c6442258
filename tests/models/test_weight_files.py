"""Faults of weight files are refused by their names, before anything is loaded."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from mellmpi.models import resolve
from tests.models import model_directories as models
from tests.models.refusals import assert_matches, refusal


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


def test_a_truncated_file_is_refused_with_its_size_and_the_expected_size(model):
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
def test_an_index_may_name_files_of_its_directory_only(model, name):
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
def test_a_model_in_another_format_is_refused_with_advice(model, name, said):
    (model / "model.safetensors").unlink()
    (model / name).touch()
    found = refusal(model)
    assert found.startswith(f"{model} has no .safetensors file; it ")
    assert said.format(m=model) in found


def test_an_adapter_is_refused_with_its_base_model(model):
    (model / "config.json").unlink()
    (model / "adapter_model.safetensors").touch()
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "has no config.json" in refusal(model) and "'org/base'" in refusal(model)
