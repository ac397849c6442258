"""Conversion of a GGUF file's tokenizer metadata to tokenizer.json and tokenizer_config.json.

GGUF stores vocabulary and merges, but only the name of the pre-tokenizer (`tokenizer.ggml.pre`);
llama.cpp's src/llama-vocab.cpp defines these names. An unknown name is refused: a wrong
pre-tokenizer would silently give other tokens for some texts.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from mellmpi.models.config_values import flag, token_ids
from mellmpi.models.model_files import short

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
PLAIN = ("gpt-2", "gpt2")
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")  # these ignore merges for tokens
SPECIALS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def write_tokenizer(metadata: dict[str, Any], vocab_size: int, directory: Path) -> None:
    """Write the tokenizer's files into `directory`; ValueError names the wrong key.

    metadata    `tokenizer.ggml.*` without that prefix, and `chat_template`
    vocab_size  rows of the embedding matrix, at least the number of tokens
    """
    kind = metadata.get("model")
    build = BUILDERS.get(kind) if isinstance(kind, str) else None
    if build is None:
        raise ValueError(
            f"GGUF tokenizer {short(kind)} is not supported; tokenizer.ggml.model may be gpt2 "
            "(byte-level BPE) or llama (sentencepiece)"
        )
    _check(metadata, vocab_size)
    tokenizer = build(metadata)
    _add_tokens(tokenizer, metadata)
    _add_bos(tokenizer, metadata)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= _special_names(metadata)
    settings["add_bos_token"] = _adds_bos(metadata)
    settings["clean_up_tokenization_spaces"] = False
    if "chat_template" in metadata:
        settings["chat_template"] = metadata["chat_template"]
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of a value of `tokenizer.ggml.pre`; ValueError if it is unknown."""
    if name in SPLITS:
        cut = Split(Regex(SPLITS[name]), behavior="isolated")
        return Sequence([cut, ByteLevel(add_prefix_space=False, use_regex=False)])
    if name in SINGLE_DIGITS:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name in PLAIN:
        return ByteLevel(add_prefix_space=False)
    known = ", ".join([*PLAIN, *SINGLE_DIGITS, *SPLITS])
    raise ValueError(
        f"GGUF pre-tokenizer {short(name)} is not supported (supported: {known}); give the model's "
        "Hugging Face directory instead"
    )


def _check(metadata: dict[str, Any], vocab_size: int) -> None:
    """ValueError unless all lists and ids have the right types and lengths."""
    tokens = _list(metadata, "tokens", str)
    if not 0 < len(tokens) <= vocab_size:
        raise ValueError(f"has {len(tokens)} tokens for {vocab_size} rows of token_embd.weight")
    for key, kind in (("token_type", int), ("scores", float)):
        if key in metadata and len(_list(metadata, key, kind)) != len(tokens):
            raise ValueError(f"tokenizer.ggml.{key} must have one value for each token")
    needed = "merges" if metadata["model"] == "gpt2" else "scores"
    if needed not in metadata:
        raise ValueError(f"lacks tokenizer.ggml.{needed}: copy or download it again")
    for key in SPECIALS:
        token_ids(metadata, f"{key}_token_id", len(tokens))
    for key in ("add_bos_token", "add_space_prefix"):
        flag(metadata, key)
    for key in ("pre", "chat_template"):
        if not isinstance(metadata.get(key, ""), str):
            raise ValueError(f"the tokenizer's {key} must be text, not {short(metadata[key])}")


def _list(metadata: dict[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise ValueError(f"tokenizer.ggml.{key} must be a list of {kind.__name__}")
    return values


def _byte_level(metadata: dict[str, Any]) -> Tokenizer:
    name = metadata.get("pre", "gpt-2")
    vocab = {token: index for index, token in enumerate(metadata["tokens"])}
    merges = [_pair(merge, vocab) for merge in _list(metadata, "merges", str)]
    bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=name in WHOLE_WORDS_FIRST)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizer(name)
    tokenizer.decoder = decoders.ByteLevel()
    if SPLITS.get(name) is _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pair(merge: str, vocab: dict[str, int]) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if left not in vocab or right not in vocab or left + right not in vocab:
        raise ValueError(f"tokenizer.ggml.merges has {short(merge)}, which makes no token")
    return left, right


def _sentencepiece(metadata: dict[str, Any]) -> Tokenizer:
    """Llama 2's tokenizer: BPE with byte fallback."""
    tokens = metadata["tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    bpe = models.BPE(
        vocab=vocab,
        merges=_merges(vocab, metadata["scores"]),
        fuse_unk=True,
        unk_token=tokens[metadata.get("unknown_token_id", 0)],
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    spaced = metadata.get("add_space_prefix", True)
    # In a normalizer, as in Llama 2's tokenizer.json and llama.cpp: a space precedes the text and
    # each text after a special token.
    prefix = [normalizers.Prepend("▁")] * spaced
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * spaced)
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece vocabulary with scores implies: best score first.

    A piece results from each pair of pieces that form it, the longest first half first.
    """
    merges: list[tuple[str, str]] = []
    for piece in sorted(vocab, key=lambda piece: (-scores[vocab[piece]], vocab[piece])):
        pairs = ((piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1))
        merges += [(left, right) for left, right in pairs if left in vocab and right in vocab]
    return merges


def _add_tokens(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    kinds = metadata.get("token_type") or [NORMAL] * len(metadata["tokens"])
    marked = list(zip(metadata["tokens"], kinds, strict=True))
    special = [AddedToken(t, normalized=False, special=True) for t, k in marked if k == CONTROL]
    whole = [AddedToken(t, normalized=False) for t, k in marked if k == USER_DEFINED]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(whole)


def _special_names(metadata: dict[str, Any]) -> dict[str, str]:
    tokens = metadata["tokens"]
    ids = {name: metadata.get(f"{key}_token_id") for key, name in SPECIALS.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def _adds_bos(metadata: dict[str, Any]) -> bool:
    """The key's value; without it llama.cpp adds BOS for sentencepiece vocabularies only."""
    return bool(metadata.get("add_bos_token", metadata["model"] == "llama"))


def _add_bos(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    bos = _special_names(metadata).get("bos_token")
    if not _adds_bos(metadata) or bos is None:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, metadata["bos_token_id"])],
    )


BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}
