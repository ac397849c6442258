"""Faults of a model directory, found before anything is loaded: only headers and sizes are read."""

from pathlib import Path

from mellmpi.models.architecture import Architecture
from mellmpi.models.foreign_formats import advice, elsewhere
from mellmpi.models.model_files import refuse_broken_link
from mellmpi.models.tokenizer_files import check_tokenizer
from mellmpi.models.weight_files import RANDOM_WEIGHTS, check_weights


def inspect(directory: Path) -> None:
    """ValueError that names the file at fault and what to do, if `directory` cannot be served."""
    for name in ("config.json", "generation_config.json"):
        refuse_broken_link(directory / name)
    if not (directory / "config.json").exists():
        raise ValueError(_without_config(directory))
    arch = Architecture.from_directory(directory)
    if not (directory / RANDOM_WEIGHTS).exists():
        check_weights(directory, arch)
    check_tokenizer(directory)


def _without_config(directory: Path) -> str:
    said = f"{directory} has no config.json, so it is no Hugging Face model directory"
    if below := elsewhere(directory):
        return f"{said}; give the one below it: {', '.join(map(str, below[:3]))}"
    what = advice(directory)
    return f"{said}; it {what}" if what else said
