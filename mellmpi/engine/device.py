"""Differences between CPU and CUDA devices: choice, copies, synchronisation, memory for KV."""

from collections.abc import Sequence

import numpy as np
import torch

from mellmpi.config import CacheConfig

CPU_KV_BYTES = 1 << 30
CUDA_SCRATCH_BYTES = 1 << 29  # always left free for activations


def choose_device(name: str) -> torch.device:
    """The device that `--device` names; `auto` is CUDA if available.

    ValueError if a CUDA device is named but torch finds none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device here; try --device cpu")
    return torch.device(name)


def copy_ints(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """int32 arrays as int64 tensors of the same shapes on `device`, by one asynchronous copy."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = torch.split(flat.long(), [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def synchronize(device: torch.device) -> None:
    """Wait for the current stream of `device`, where steps run; other streams go on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def kv_budget_bytes(cache: CacheConfig, device: torch.device) -> int:
    """Bytes for the KV arena; call it when the weights are loaded.

    On CUDA weights and KV together take `gpu_memory_utilization` of the device's memory, but no
    memory that other processes hold: workers may share a device. May be negative.
    """
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes
    if device.type == "cpu":
        return CPU_KV_BYTES
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    return min(int(cache.gpu_memory_utilization * total) - reserved, free - CUDA_SCRATCH_BYTES)
