"""Each fault of a model directory is refused by `resolve` with the file and advice."""

import os

import pytest

from mellmpi.models import resolve
from tests.models import model_directories as models
from tests.models.refusals import POINTER, assert_matches, change_config, refusal

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def test_a_complete_model_is_used_in_place(model):
    assert resolve(str(model), model.parent / "cache") == model
    models.write_shards(model, 3)
    assert resolve(str(model), model.parent / "cache") == model


# --- all files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors", "chat_template.jinja"])
def test_a_git_lfs_pointer_is_refused_with_the_command_that_gets_the_file(model, name):
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


def test_a_line_end_in_a_path_does_not_break_the_message(tmp_path):
    model = models.write_model(tmp_path / "two\nlines")
    (model / "config.json").write_text("")
    assert r"two\nlines" in refusal(model)


# --- other paths ---------------------------------------------------------------------------------


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
