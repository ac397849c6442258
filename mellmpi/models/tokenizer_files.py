"""Checks of the tokenizer files in a model directory, by their first and last bytes."""

import importlib.metadata
from pathlib import Path

from mellmpi.models.model_files import (
    check_json_ends,
    read_json,
    refuse_broken_link,
    refuse_pointer,
)

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json")
TEXTS = ("chat_template.jinja", "merges.txt")
CONVERTERS = ("sentencepiece", "protobuf")  # packages with which transformers reads tokenizer.model


def check_tokenizer(directory: Path) -> None:
    """ValueError unless `directory` has tokenizer files, and their ends look valid."""
    for name in ("tokenizer.json", *SETTINGS, *TEXTS):
        refuse_broken_link(directory / name)
    for name in SETTINGS:
        if (directory / name).exists():
            read_json(directory / name)
    for name in TEXTS:
        if (directory / name).exists():
            refuse_pointer(_head(directory / name), directory / name)
    if (directory / "tokenizer.json").exists():
        check_json_ends(directory / "tokenizer.json")
    elif (directory / "tokenizer.model").exists():
        _check_sentencepiece(directory / "tokenizer.model")
    elif all((directory / name).exists() for name in ("vocab.json", "merges.txt")):
        check_json_ends(directory / "vocab.json")
    else:
        raise ValueError(
            f"{directory} has no tokenizer.json: copy or download it from the model's repository"
        )


def _check_sentencepiece(file: Path) -> None:
    """ValueError unless transformers can convert `file`, a tokenizer.model."""
    head = _head(file)
    refuse_pointer(head, file)
    if not head.startswith(b"\n"):  # the first field, `pieces`, of sentencepiece_model.proto
        raise ValueError(
            f"{file} is not a SentencePiece model: copy or download tokenizer.json instead"
        )
    if missing := [name for name in CONVERTERS if not _is_installed(name)]:
        raise ValueError(
            f"{file} is a SentencePiece model without a tokenizer.json; to convert it when it is "
            f"loaded: pip install {' '.join(missing)}"
        )


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(200)


def _is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False
