"""Tokenizers of GGUF files: equal to transformers and to the original tokenizers."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mellmpi.models.gguf_tokenizer import pre_tokenizer
from tests.models import gguf_files as files
from tests.models.gguf_files import converted

TEXTS = [
    "The capital of Norway is Oslo.",
    "a   12 b  3.14 x 2024-05-06",
    "  two leading spaces\n\n\ttab, née 日本語 👍🏽 don't I'LL",
    "<|im_start|>user\nhi<|im_end|>\n",
]


def test_digits_of_the_demo_model_are_split_before_anything_else(smollm2):
    ours = json.loads((smollm2 / "tokenizer.json").read_text())["pre_tokenizer"]
    digits, byte_level = ours["pretokenizers"]
    assert (digits["type"], digits["individual_digits"]) == ("Digits", True)
    assert (byte_level["type"], byte_level["add_prefix_space"]) == ("ByteLevel", False)
    assert byte_level["use_regex"]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a   12", ["a", "ĠĠĠ", "1", "2"]),
        ("x 7", ["x", "Ġ", "7"]),
        ("in 2024.", ["in", "Ġ", "2", "0", "2", "4", "."]),
        ("  3", ["ĠĠ", "3"]),
        ("The quick brown", ["The", "Ġquick", "Ġbrown"]),
        ("<|im_start|>user\n", ["<|im_start|>", "user", "Ċ"]),
    ],
)
def test_the_demo_model_splits_text_as_the_original(smollm2, text, pieces):
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert tokenizer.encode(text).tokens == pieces


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_reads_the_tokenizer_with_the_same_result(smollm2, text):
    ours = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(str(smollm2))
    assert theirs.encode(text) == ours.encode(text).ids
    assert theirs.decode(theirs.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert theirs.chat_template.startswith("{% for message in messages %}")


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "it's 1234 ok", ["it", "'s", "Ġ1234", "Ġok"]),
        ("smollm", "it's 1234 ok", ["it", "'s", "Ġ", "1", "2", "3", "4", "Ġok"]),
        ("llama-bpe", "IT'S 12345 ok\n\n", ["IT", "'S", "Ġ", "123", "45", "Ġok", "ĊĊ"]),
        ("qwen2", "it's 123 ok", ["it", "'s", "Ġ", "1", "2", "3", "Ġok"]),
        ("tekken", "HelloWorld 12/", ["Hello", "World", "Ġ", "1", "2", "/"]),
    ],
)
def test_each_named_pre_tokenizer_splits_as_in_llama_cpp(name, text, pieces):
    assert [piece for piece, _ in pre_tokenizer(name).pre_tokenize_str(text)] == pieces


def test_an_unknown_pre_tokenizer_is_refused(tmp_path):
    def vocabulary(writer):
        files.byte_vocabulary(writer, pre="martian")

    with pytest.raises(ValueError, match=r"'martian' is not supported .supported: gpt-2"):
        converted(tmp_path, files.tiny("llama"), tokenizer=vocabulary)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-2"])
@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_vocabularies_agree_with_transformers(tmp_path, pre, text):
    def vocabulary(writer):
        files.byte_vocabulary(writer, pre, merges=("Ġ t", "h e", "Ġt he", "1 2", "Ġ Ġ", "o s"))

    target = converted(tmp_path, files.tiny("llama"), tokenizer=vocabulary)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="tiny.gguf")
    ours = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert ours.encode(text).ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_qwen_composes_characters_before_splitting(tmp_path):
    def vocabulary(writer):
        files.byte_vocabulary(writer, "qwen2")

    target = converted(tmp_path, files.tiny("qwen2"), tokenizer=vocabulary)
    ours = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert ours.encode("e\u0301").ids == ours.encode("\u00e9").ids


def test_llama_3_uses_a_token_of_a_whole_word_without_merges(tmp_path):
    for pre, pieces in (("llama-bpe", ["whole"]), ("gpt-2", ["w", "h", "o", "l", "e"])):
        target = converted(
            tmp_path,
            files.tiny("llama"),
            tokenizer=lambda writer, pre=pre: files.byte_vocabulary(writer, pre, words=("whole",)),
        )
        assert Tokenizer.from_file(str(target / "tokenizer.json")).encode("whole").tokens == pieces


def test_a_sentencepiece_vocabulary_merges_by_score_and_falls_back_to_bytes(tmp_path):
    target = converted(tmp_path, files.tiny("llama"), tokenizer=files.sentencepiece_vocabulary)
    ours = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert ours.encode("the cat").tokens == ["<s>", "▁the", "▁cat"]
    assert ours.encode("aaaa").tokens == ["<s>", "▁", "aa", "aa"]
    assert ours.encode("né").tokens == ["<s>", "▁", "n", "<0xC3>", "<0xA9>"]
    assert ours.encode("<s>[", add_special_tokens=False).tokens == ["<s>", "▁", "["]
    for text in ("the cat sat on  the hat", "né 日本 aaaaa", "at\nthe"):
        assert ours.decode(ours.encode(text).ids) == text
        theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="tiny.gguf")
        assert ours.encode(text).ids == theirs.encode(text)
