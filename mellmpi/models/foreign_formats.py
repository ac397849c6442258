"""Advice for a directory that holds a model in a format that cannot be loaded."""

from collections.abc import Callable
from pathlib import Path

from mellmpi.models.model_files import read_json, short

UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")


def advice(directory: Path) -> str | None:
    """The format of the weights in `directory`, and what to do; None if it has no known format.

    The text continues a sentence that names the directory.
    """
    for patterns, describe in FORMATS:
        files = [file for pattern in patterns for file in sorted(directory.glob(pattern))]
        if files:
            return describe(directory, files)
    return None


def models_below(directory: Path) -> list[Path]:
    """Model directories below `directory`, such as the snapshots of a Hugging Face cache."""
    if (main := directory / "refs" / "main").is_file():
        snapshot = directory / "snapshots" / main.read_text(errors="replace").strip()
        if (snapshot / "config.json").is_file():
            return [snapshot]
    found = [
        file
        for pattern in ("*", "snapshots/*", "*/snapshots/*")
        for file in directory.glob(f"{pattern}/config.json")
    ]
    return sorted(file.parent for file in found)


def _unfinished(directory: Path, files: list[Path]) -> str:
    return f"holds an unfinished download ({files[0].name}): download the model again"


def _gguf(directory: Path, files: list[Path]) -> str:
    return f"holds GGUF: give the file, --model {files[0]}"


def _adapter(directory: Path, files: list[Path]) -> str:
    settings = directory / "adapter_config.json"
    base = read_json(settings).get("base_model_name_or_path") if settings.is_file() else None
    return (
        f"holds an adapter (LoRA), not a model: merge it into its base model "
        f"{short(base) if base else ''} with peft's merge_and_unload, and give the merged model"
    )


def _bin(directory: Path, files: list[Path]) -> str:
    return (
        f"holds PyTorch's {files[0].name}, which is not read here: convert it with python -c "
        '"from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{directory}').save_pretrained('{directory}')\""
    )


def _consolidated(directory: Path, files: list[Path]) -> str:
    return (
        f"holds {files[0].name}, the maker's own format: get the model in Hugging Face's format, "
        "with config.json and model*.safetensors"
    )


FORMATS: list[tuple[list[str], Callable[[Path, list[Path]], str]]] = [
    ([f"*.safetensors{ending}" for ending in UNFINISHED], _unfinished),
    (["adapter_model.safetensors", "adapter_model.bin"], _adapter),
    (["*.gguf"], _gguf),
    (["pytorch_model*.bin"], _bin),
    (["consolidated*.safetensors", "*.pth"], _consolidated),
]
