"""Activations in the dtype of this CPU's kernels, and back."""

import numpy as np
import torch

from mellmpi.engine.cpu.packed_weights import activation_dtype


def empty(shape, dtype):
    """Zeros of `activation_dtype`."""
    return np.zeros(shape, activation_dtype(dtype))


def values(stored, dtype):
    """Activations as a tensor of the weights' dtype."""
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    wide = torch.from_numpy(stored.view(np.float32))
    assert torch.equal(wide, wide.to(dtype).float()), "rounded to the dtype"
    return wide.to(dtype)
