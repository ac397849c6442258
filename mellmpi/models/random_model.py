"""`random:CONFIG`: a model of any shape with seeded random weights, for tests and measurements."""

import json
import shutil
from pathlib import Path
from typing import Any

from mellmpi.models.architecture import Architecture
from mellmpi.models.model_files import expanded, read_json
from mellmpi.models.tokenizer_files import check_tokenizer
from mellmpi.models.weight_files import RANDOM_WEIGHTS

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _tiny(family: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": family,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **changes,
    }


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}

NAMED: dict[str, dict[str, Any]] = {
    "tiny-llama": _tiny("llama"),
    "tiny-llama3": _tiny("llama", rope_theta=500000.0, rope_scaling=LLAMA3_ROPE),
    "tiny-mistral": _tiny("mistral", sliding_window=None),
    "tiny-qwen2": _tiny("qwen2", tie_word_embeddings=True),
    "tiny-qwen3": _tiny("qwen3", head_dim=32),
}


def write_random_model(config: str, directory: Path) -> None:
    """Write config.json and tokenizer files into `directory`.

    config      a name in `NAMED`, the path of a config.json, or of a directory that has one
    ValueError  there is no such file, or it is not valid
    """
    source = expanded(config)
    if config in NAMED:
        settings, tokenizer_dir = NAMED[config], None
        arch = Architecture.from_hf(settings)
    elif (file := source / "config.json" if source.is_dir() else source).is_file():
        settings, tokenizer_dir = read_json(file), file.parent
        arch = Architecture.from_file(file)
    else:
        raise ValueError(
            f"random:{config}: there is no such file; give the path of a config.json, a directory "
            f"that has one, or one of {', '.join(NAMED)}"
        )
    (directory / "config.json").write_text(json.dumps(settings, indent=1))
    (directory / RANDOM_WEIGHTS).write_text("")
    if tokenizer_dir is not None and (tokenizer_dir / "tokenizer.json").exists():
        check_tokenizer(tokenizer_dir)
        _copy_tokenizer(tokenizer_dir, directory)
    else:
        write_byte_tokenizer(arch.vocab_size, directory)


def _copy_tokenizer(source: Path, directory: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, directory / name)


def write_byte_tokenizer(vocab_size: int, directory: Path) -> None:
    """Write a tokenizer with one token for each byte, three special tokens and a ChatML template.

    ValueError if `vocab_size` is too small.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    if vocab_size < len(vocab):
        raise ValueError(
            f"vocab_size {vocab_size} is too small for the byte tokenizer, which needs "
            f"{len(vocab)}; put a tokenizer.json beside config.json"
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "chat_template": CHATML,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
