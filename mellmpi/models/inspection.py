"""Checks of a model directory before loading: only headers and sizes are read."""

from pathlib import Path

from mellmpi.models.architecture import Architecture
from mellmpi.models.foreign_formats import advice, models_below
from mellmpi.models.model_files import refuse_broken_link
from mellmpi.models.tokenizer_files import check_tokenizer
from mellmpi.models.weight_files import RANDOM_WEIGHTS, check_weights


def inspect(directory: Path) -> None:
    """ValueError names the wrong file and what to do, if `directory` cannot be served."""
    for name in ("config.json", "generation_config.json"):
        refuse_broken_link(directory / name)
    if not (directory / "config.json").exists():
        raise ValueError(_without_config(directory))
    arch = Architecture.from_directory(directory)
    if not (directory / RANDOM_WEIGHTS).exists():
        check_weights(directory, arch)
    check_tokenizer(directory)


def _without_config(directory: Path) -> str:
    fault = f"{directory} has no config.json, so it is no Hugging Face model directory"
    if below := models_below(directory):
        return f"{fault}; give the one below it: {', '.join(map(str, below[:3]))}"
    advised = advice(directory)
    return f"{fault}; it {advised}" if advised else fault
