"""Loading of weights: safetensors of a checkpoint directory, or seeded random numbers."""

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from mellmpi.models import (
    RANDOM_WEIGHTS,
    Architecture,
    check_parameters,
    parameter_name,
    parameter_shapes,
    tensor_seed,
    weight_files,
)

Weights = dict[str, torch.Tensor]


def load(
    directory: Path, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> tuple[Architecture, Weights]:
    """The architecture and weights of a directory that `models.resolve` returned.

    Names and shapes are those of `parameter_shapes`; tied models have no `lm_head.weight`. `seed`
    is for random models only, and gives the same numbers on every rank and device. On a CPU a
    tensor that is stored in `dtype` may share pages with other ranks of the host: do not write to
    it. ValueError names missing, unexpected and misshaped weights.
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


def _read(
    file: Path, arch: Architecture, dtype: torch.dtype, device: torch.device | str
) -> Weights:
    weights: Weights = {}
    with safe_open(file, framework="pt") as tensors:
        for stored in tensors.keys():  # noqa: SIM118  (not a dict)
            name = parameter_name(stored, arch)
            if name is None:
                continue
            weights[name] = tensors.get_tensor(stored).to(device=device, dtype=dtype)
    return weights


def random_weights(
    arch: Architecture, dtype: torch.dtype, device: torch.device | str, seed: int
) -> Weights:
    """Seeded weights: matrices and biases N(0, 0.02²), norms N(1, 0.02²)."""
    weights: Weights = {}
    for name, shape in parameter_shapes(arch).items():
        # numpy's generators give the same numbers on every processor and in every version.
        rng = np.random.default_rng(tensor_seed(seed, name))
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        if name.endswith("norm.weight"):
            values += 1
        weights[name] = torch.from_numpy(values).to(device=device, dtype=dtype)
    return weights
