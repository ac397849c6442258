"""What differs between a CPU and a CUDA device: choosing one, copying to it, memory for KV."""

from collections.abc import Sequence

import numpy as np
import torch

from mellmpi.config import CacheConfig

CPU_KV_BYTES = 1 << 30
CUDA_SCRATCH_BYTES = 1 << 29  # for activations, however full the device is


def choose_device(name: str) -> torch.device:
    """The device that `--device` means; `auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no CUDA device here; try --device cpu")
    return torch.device(name)


def copy_ints(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """int32 arrays as int64 tensors of the same shapes on `device`, by one copy, not waited for."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    parts = flat.long().split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def finish(device: torch.device) -> None:
    """Wait until the steps begun on `device` are done; copies on other streams go on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def kv_budget_bytes(cache: CacheConfig, device: torch.device) -> int:
    """Bytes for the KV arena once the weights are loaded.

    On CUDA this process takes its share of the whole in all, and never what others already hold:
    workers may share a device.
    """
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes
    if device.type == "cpu":
        return CPU_KV_BYTES
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    return min(int(cache.gpu_memory_utilization * total) - ours, free - CUDA_SCRATCH_BYTES)
