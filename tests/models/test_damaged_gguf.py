"""A GGUF file with any damage is refused with its name."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from mellmpi.models import resolve
from mellmpi.models.gguf import convert
from mellmpi.models.gguf_file import read_gguf
from tests.models import gguf_files as files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 25464248\n"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def whole(request, tmp_path_factory) -> bytes:
    """A tiny model with each kind of tokenizer."""
    file = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    vocabulary = {"gpt2": files.byte_vocabulary, "llama": files.sentencepiece_vocabulary}
    files.write_gguf(
        file, files.tiny("llama", num_hidden_layers=1), tokenizer=vocabulary[request.param]
    )
    return file.read_bytes()


def refusal(file: Path, cache_dir: Path) -> str:
    """The message with which `resolve` refuses a file: one line; no file remains in the cache."""
    with pytest.raises(ValueError) as error:
        resolve(str(file), cache_dir)
    said = str(error.value)
    assert said.startswith(str(file)) and len(said.splitlines()) == 1
    assert not list(cache_dir.iterdir())
    return said


def test_values_equal_those_that_the_gguf_package_reads(tmp_path, whole):
    file = tmp_path / "x.gguf"
    file.write_bytes(whole)
    theirs, ours = GGUFReader(str(file)), read_gguf(file)
    counted = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
    fields = {name: f.contents() for name, f in theirs.fields.items() if name not in counted}
    assert ours.metadata == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.kind == tensor.tensor_type
        assert found.shape == tuple(tensor.shape[::-1])
        assert found.data.tobytes() == tensor.data.tobytes()


def test_every_cut_is_refused_by_name(tmp_path, whole):
    file, cache_dir = tmp_path / "cut.gguf", tmp_path / "cache"
    for size in [*range(0, 200, 7), *range(200, len(whole), 1000), len(whole) - 1]:
        file.write_bytes(whole[:size])
        assert refusal(file, cache_dir).endswith("copy or download it again")


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_a_changed_file_is_served_or_refused_by_name(tmp_path_factory, whole, data):
    folder = tmp_path_factory.mktemp("changed")
    file, target = folder / "changed.gguf", folder / "out"
    target.mkdir()
    changed = bytearray(whole)
    ends = st.one_of(st.integers(0, 12_000), st.integers(0, len(whole) - 8))
    for position in data.draw(st.lists(ends, min_size=1, max_size=3)):
        changed[position] = data.draw(st.sampled_from([0, 1, 2, 8, 9, 127, 128, 255]))
    file.write_bytes(changed)
    try:
        convert(file, target, lambda text: None)
    except ValueError as error:
        assert str(file) in str(error)


def test_a_length_beyond_the_file_is_refused_before_memory_is_allocated(tmp_path, whole):
    key = b"tokenizer.ggml.token_type"
    place = whole.index(key) + len(key) + 8  # behind the types of the array and of its values
    changed = bytearray(whole)
    changed[place : place + 8] = struct.pack("<Q", 1 << 60)
    (tmp_path / "x.gguf").write_bytes(changed)
    assert "is damaged or cut short" in refusal(tmp_path / "x.gguf", tmp_path / "cache")


def test_a_tensor_without_numbers_or_text_in_another_encoding_is_refused(tmp_path, whole):
    key = b"token_embd.weight"
    place = whole.index(key) + len(key) + 4
    sizes, text = bytearray(whole), bytearray(whole)
    sizes[place : place + 16] = struct.pack("<2Q", (1 << 64) - 1, 0)
    text[place - 5] = 0xFF
    for changed, said in ((sizes, "has a wrong tensor"), (text, "has text that is not UTF-8")):
        (tmp_path / "x.gguf").write_bytes(changed)
        assert said in refusal(tmp_path / "x.gguf", tmp_path / "cache")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (POINTER, "is a Git LFS pointer, not the file itself: run `git lfs pull` in "),
        (b"GGML" + bytes(60), "is no GGUF file"),
        (b"GGUF\1\0\0\0" + bytes(60), "is a GGUF file of version 1; supported are 2, 3"),
        (b"GGUF\0\0\0\3" + bytes(60), "is a big-endian GGUF file"),
        (b"", "has too few bytes"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, head, said):
    (tmp_path / "x.gguf").write_bytes(head)
    assert said in refusal(tmp_path / "x.gguf", tmp_path / "cache")


def refusal_of(tmp_path, name="x.gguf", extra=(), **options) -> str:
    """The refusal of a tiny model with `extra` metadata: (key, value, type)."""
    file = tmp_path / name

    def vocabulary(writer):
        options.get("tokenizer", files.byte_vocabulary)(writer)
        for key, value, kind in extra:
            writer.kv_data[0][key] = gguf.GGUFValue(value, kind)  # also over what is there

    model = files.tiny("llama", num_hidden_layers=1)
    files.write_gguf(file, model, tokenizer=vocabulary, kind=options.get("kind", Kind.F32))
    return refusal(file, tmp_path / "cache")


U16, I32, U32, F32, TEXT = (
    gguf.GGUFValueType.UINT16,
    gguf.GGUFValueType.INT32,
    gguf.GGUFValueType.UINT32,
    gguf.GGUFValueType.FLOAT32,
    gguf.GGUFValueType.STRING,
)
PART = "m-00002-of-00003.gguf"


@pytest.mark.parametrize(("name", "extra"), [(PART, []), ("m.gguf", [("split.count", 3, U16)])])
def test_a_part_of_a_split_model_says_how_to_join_the_parts(tmp_path, name, extra):
    said = refusal_of(tmp_path, name, extra)
    first = tmp_path / ("m-00001-of-00003.gguf" if name == PART else name)
    assert f"llama-gguf-split --merge {first} {tmp_path}/m-merged.gguf" in said


@pytest.mark.parametrize(
    ("key", "value", "kind", "said"),
    [
        ("general.type", "adapter", TEXT, "not a language model but of the type 'adapter'"),
        ("general.type", "mmproj", TEXT, "not a language model but of the type 'mmproj'"),
        ("general.architecture", "clip", TEXT, "architecture 'clip', which is not supported"),
        ("general.architecture", 7, U32, "architecture 7, which is not supported"),
        ("general.alignment", 0, U32, "general.alignment must be a whole number"),
        ("llama.block_count", 2.0, F32, "llama.block_count must be a whole number"),
        ("llama.block_count", "2", TEXT, "llama.block_count must be a whole number"),
        ("llama.attention.head_count", 0, U32, "llama.attention.head_count must be a whole"),
        ("llama.attention.head_count_kv", -1, I32, "llama.attention.head_count_kv must be"),
        ("llama.attention.layer_norm_rms_epsilon", "x", TEXT, "rms_epsilon must be a number"),
        ("llama.rope.freq_base", "x", TEXT, "rope_theta must be a number"),
        ("llama.rope.scaling.type", "longrope", TEXT, "'longrope' is not supported"),
        ("llama.rope.scaling.type", 4, U32, "rope type 4 is not supported"),
        ("tokenizer.ggml.model", "bert", TEXT, "tokenizer 'bert' is not supported"),
        ("tokenizer.ggml.model", 4, U32, "tokenizer 4 is not supported"),
        ("tokenizer.ggml.model", "llama", TEXT, "lacks tokenizer.ggml.scores"),
        ("tokenizer.ggml.pre", "martian", TEXT, "pre-tokenizer 'martian' is not supported"),
        ("tokenizer.ggml.pre", 4, U32, "pre must be text, not 4"),
        ("tokenizer.ggml.tokens", "x", TEXT, "tokenizer.ggml.tokens must be a list of str"),
        ("tokenizer.ggml.merges", "x", TEXT, "tokenizer.ggml.merges must be a list of str"),
        ("tokenizer.ggml.token_type", 1, U32, "tokenizer.ggml.token_type must be a list of int"),
        ("tokenizer.ggml.eos_token_id", 320, U32, "eos_token_id must be token ids from 0 to 319"),
        ("tokenizer.ggml.eos_token_id", "2", TEXT, "eos_token_id must be a token id or null"),
        ("tokenizer.ggml.bos_token_id", 999, U32, "bos_token_id must be token ids from 0 to"),
        ("tokenizer.ggml.add_bos_token", "yes", TEXT, "add_bos_token must be true or false"),
        ("tokenizer.chat_template", 7, U32, "chat_template must be text, not 7"),
    ],
)
def test_metadata_of_a_wrong_kind_is_refused_by_its_key(tmp_path, key, value, kind, said):
    assert said in refusal_of(tmp_path, extra=[(key, value, kind)])


@pytest.mark.parametrize("merge", ["Ġ", "Ġ  t", "Ġ x y", "q Ġ", "zz t"])
def test_a_merge_that_gives_no_token_is_refused(tmp_path, merge):
    values = gguf.GGUFValueType.ARRAY
    said = refusal_of(tmp_path, extra=[("tokenizer.ggml.merges", [merge], values)])
    assert f"tokenizer.ggml.merges has {merge!r}, which makes no token" in said


def test_lists_of_the_tokenizer_with_wrong_lengths_are_refused(tmp_path):
    values = gguf.GGUFValueType.ARRAY
    said = refusal_of(tmp_path, extra=[("tokenizer.ggml.token_type", [1, 2], values)])
    assert "tokenizer.ggml.token_type must have one value for each token" in said
    said = refusal_of(
        tmp_path, extra=[("tokenizer.ggml.tokens", [f"t{n}" for n in range(321)], values)]
    )
    assert "has 321 tokens for 320 rows of token_embd.weight" in said


def write_without(file: Path, key: str) -> None:
    def vocabulary(writer):
        files.byte_vocabulary(writer)
        del writer.kv_data[0][key]

    files.write_gguf(file, files.tiny("llama", num_hidden_layers=1), tokenizer=vocabulary)


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        "llama.block_count",
        "llama.embedding_length",
        "llama.attention.head_count",
        "llama.feed_forward_length",
        "llama.context_length",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
    ],
)
def test_a_missing_key_is_named(tmp_path, key):
    write_without(tmp_path / "x.gguf", key)
    said = refusal(tmp_path / "x.gguf", tmp_path / "cache")
    assert key.removeprefix("tokenizer.ggml.").removeprefix("general.") in said


@pytest.mark.parametrize("kind", [Kind.I8, Kind.F64, Kind.Q8_K])
def test_a_type_of_tensor_that_cannot_be_read_is_named(tmp_path, kind):
    row = gguf.GGML_QUANT_SIZES[kind][1]
    plain = {Kind.I8: np.int8, Kind.F64: np.float64}.get(kind, np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor(
        "token_embd.weight",
        np.zeros((4, row), plain),
        raw_dtype=kind if plain == np.uint8 else None,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = refusal(tmp_path / "x.gguf", tmp_path / "cache")
    assert f"holds 'token_embd.weight' in the type {kind.name}, which is not supported" in said
    assert said.endswith("take a file of another type, such as Q8_0, Q4_K_M or F16")


KEY = struct.pack("<Q", 1) + b"k" + struct.pack("<II", 4, 7)  # k = 7, of 32 bits


def tensor_info(*shape: int, kind: Kind = Kind.F32) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", 1) + b"t" + sizes + struct.pack("<IQ", kind, 0)


@pytest.mark.parametrize(
    ("keys", "infos", "said"),
    [
        ([KEY, KEY], [], "has the key 'k' twice"),
        ([KEY], [tensor_info(1), tensor_info(1)], "has a wrong tensor 't'"),
        ([KEY], [tensor_info(33, kind=Kind.Q8_0)], "has a wrong tensor 't'"),
        ([KEY], [tensor_info()], "has a tensor 't' of 0 dimensions"),
        ([KEY], [tensor_info(1, 1, 1, 1, 1)], "has a tensor 't' of 5 dimensions"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, keys, infos, said):
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys))
    (tmp_path / "x.gguf").write_bytes(head + b"".join(keys + infos) + bytes(1000))
    assert said in refusal(tmp_path / "x.gguf", tmp_path / "cache")


def test_a_split_model_of_one_part_is_accepted(tmp_path):
    file = tmp_path / "m-00001-of-00001.gguf"
    files.write_gguf(file, files.tiny("llama", num_hidden_layers=1))
    assert resolve(str(file), tmp_path / "cache").is_dir()


def test_an_unknown_type_of_tensor_is_named(tmp_path, whole):
    key = b"token_embd.weight"
    place = whole.index(key) + len(key) + 4 + 16
    changed = bytearray(whole)
    changed[place : place + 4] = struct.pack("<I", 250)
    (tmp_path / "x.gguf").write_bytes(changed)
    said = refusal(tmp_path / "x.gguf", tmp_path / "cache")
    assert "holds 'token_embd.weight' in the unknown type 250: take a file of another" in said
