"""The safetensors files of a model directory, and the weights that their headers list."""

import re
from pathlib import Path

from mellmpi.models.architecture import Architecture
from mellmpi.models.foreign_formats import UNFINISHED, advice
from mellmpi.models.model_files import read_json, refuse_broken_link, short
from mellmpi.models.parameters import Shape, check_parameters
from mellmpi.models.safetensors_header import read_header

RANDOM_WEIGHTS = "random-weights"  # the presence of this file means: generate random weights
INDEX = "model.safetensors.index.json"
SERVED_TYPES = ("F32", "BF16", "F16", "F64")  # other types need scales, which are not read
FOREIGN = ("consolidated", "adapter_model")  # prefixes of files that are not Hugging Face weights


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files to load: those that the index lists, or all of the directory.

    ValueError says what to do if there are none or if some are missing.
    """
    if (index := directory / INDEX).exists():
        names = _indexed(index)
    elif (directory / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        found = sorted(file.name for file in directory.glob("*.safetensors"))
        names = _with_siblings([name for name in found if not name.startswith(FOREIGN)])
    if not names:
        advised = advice(directory) or "holds no other weights, either: copy or download them"
        raise ValueError(f"{directory} has no .safetensors file; it {advised}")
    _refuse_missing(names, directory)
    return [directory / name for name in names]


def check_weights(directory: Path, arch: Architecture) -> None:
    """ValueError unless the headers list all weights of `arch`, in types that can be loaded."""
    found: dict[str, Shape] = {}
    for file in weight_files(directory):
        for stored, tensor in read_header(file).items():
            name = parameter_name(stored, arch)
            if name is None:
                continue
            if tensor.dtype not in SERVED_TYPES:
                raise ValueError(
                    f"{file} holds {short(stored)} as {short(tensor.dtype)}; supported are "
                    f"{', '.join(SERVED_TYPES)}, and GGUF files of any type"
                )
            found[name] = tensor.shape
    check_parameters(found, arch, str(directory))


def parameter_name(stored: str, arch: Architecture) -> str | None:
    """The name in `parameter_shapes` of a checkpoint's tensor; None for one that is not loaded."""
    if stored.endswith("rotary_emb.inv_freq"):  # a buffer in old checkpoints
        return None
    name = stored if stored.startswith(("model.", "lm_head.")) else f"model.{stored}"
    return None if name == "lm_head.weight" and arch.tie_embeddings else name


# --- missing files -------------------------------------------------------------------------------


def _indexed(index: Path) -> list[str]:
    """The different file names in an index; ValueError unless all are plain file names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: copy or download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise ValueError(
                f"{index} names {short(name)}, which is no .safetensors file beside it: copy or "
                "download it again"
            )
    return list(dict.fromkeys(weight_map.values()))


def _with_siblings(names: list[str]) -> list[str]:
    """`names` and the other files of their sets: model-00001-of-00003 is of three files."""
    for name in names:
        if match := re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.safetensors)", name):
            start, end, count = match.groups()
            names = names + [f"{start}{n:05}{end}" for n in range(1, int(count) + 1)]
    return list(dict.fromkeys(names))


def _refuse_missing(names: list[str], directory: Path) -> None:
    missing = [name for name in names if not (directory / name).is_file()]
    if not missing:
        return
    refuse_broken_link(directory / missing[0])
    listed = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
    unfinished = [
        name for name in missing for end in UNFINISHED if (directory / (name + end)).exists()
    ]
    raise ValueError(
        f"{directory} lacks {listed}: {len(missing)} of {len(names)} weight files are missing"
        f"{f' ({len(unfinished)} unfinished)' if unfinished else ''}; "
        "copy or download the model again"
    )
