"""Weights into memory: safetensors of a checkpoint directory, or seeded random numbers."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from mellmpi.engine.architecture import Architecture
from mellmpi.engine.checkpoint import RANDOM_WEIGHTS
from mellmpi.engine.parameters import check_parameters, parameter_shapes, tensor_seed

Weights = dict[str, torch.Tensor]


def load(
    directory: Path, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> tuple[Architecture, Weights]:
    """Architecture and weights of a directory that `checkpoint.resolve` gave.

    Names are those of `parameter_shapes`: tied models have no `lm_head.weight`. `seed` matters to
    random models only, and gives the same numbers on every rank and device. On the CPU a tensor
    already stored in `dtype` may share pages with other ranks of the host: do not write to it.
    """
    arch = Architecture.from_directory(directory)
    if (directory / RANDOM_WEIGHTS).exists():
        return arch, random_weights(arch, dtype, device, seed)
    weights: Weights = {}
    for file in weight_files(directory):
        weights |= _read(file, arch, dtype, device)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    check_parameters(shapes, arch, str(directory))
    return arch, weights


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, or the only one."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
        files = [directory / name for name in names]
    elif (single := directory / "model.safetensors").exists():
        files = [single]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has no .safetensors file")
    if missing := [file.name for file in files if not file.exists()]:
        raise ValueError(f"{directory} lacks {', '.join(missing)}, which its index names")
    return files


def canonical_name(name: str) -> str | None:
    """A checkpoint's name for a tensor as `parameter_shapes` has it; None: not a weight."""
    if name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints carry
        return None
    if name.startswith(("model.", "lm_head.")):
        return name
    return f"model.{name}"  # saved from the model without its head


def _read(
    file: Path, arch: Architecture, dtype: torch.dtype, device: torch.device | str
) -> Weights:
    weights: Weights = {}
    with safe_open(file, framework="pt") as tensors:
        for stored in tensors.keys():  # noqa: SIM118  (not a dict)
            name = canonical_name(stored)
            if name is None or (name == "lm_head.weight" and arch.tie_embeddings):
                continue
            weights[name] = tensors.get_tensor(stored).to(device=device, dtype=dtype)
    return weights


def random_weights(
    arch: Architecture, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Weights:
    """Seeded weights of the usual sizes: matrices N(0, 0.02²), biases alike, norms near 1."""
    weights: Weights = {}
    for name, shape in parameter_shapes(arch).items():
        # numpy's generators promise the same numbers on every processor and in every version.
        rng = np.random.default_rng(tensor_seed(seed, name))
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        if name.endswith("norm.weight"):
            values += 1
        weights[name] = torch.from_numpy(values).to(device=device, dtype=dtype)
    return weights
