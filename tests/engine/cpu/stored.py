"""Activations as this CPU's kernels store them, and back."""

import numpy as np
import torch

from mellmpi.engine.cpu.packed_weights import activation_dtype


def empty(shape, dtype):
    """Zeros for activations of weights of this dtype."""
    return np.zeros(shape, activation_dtype(dtype))


def values(stored, dtype):
    """What activations stand for."""
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    wide = torch.from_numpy(stored.view(np.float32))
    assert torch.equal(wide, wide.to(dtype).float()), "rounded as the dtype is"
    return wide.to(dtype)
