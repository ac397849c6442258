import numpy as np
import pytest
import torch

from mellmpi.config import CacheConfig
from mellmpi.engine import choose_device, kv_budget_bytes, synchronize
from mellmpi.engine.device import copy_ints

GIB = 1 << 30
CUDA = torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    """Simulate a device of 80 GiB: (GiB reserved by this process, GiB by others)."""

    def hold(ours, others=0):
        free = 80 - ours - others
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: ours * GIB)

    return hold


def test_auto_is_cuda_if_available(monkeypatch):
    for available, name in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert choose_device("auto").type == name


def test_copied_integers_keep_their_shapes():
    arrays = [
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.zeros(0, np.int32),
        np.array([7, 8], np.int32),
    ]
    copied = copy_ints(arrays, torch.device("cpu"))
    assert [tensor.dtype for tensor in copied] == [torch.int64] * 3
    assert [tensor.tolist() for tensor in copied] == [array.tolist() for array in arrays]


def test_a_configured_number_is_the_budget_on_any_device():
    for device in (torch.device("cpu"), CUDA):
        assert kv_budget_bytes(CacheConfig(kv_cache_memory_bytes=123), device) == 123


def test_the_budget_of_a_gpu_is_its_share_less_the_weights(gpu):
    gpu(ours=16)
    assert kv_budget_bytes(CacheConfig(gpu_memory_utilization=0.9), CUDA) == (72 - 16) * GIB


def test_a_second_worker_on_a_gpu_still_gets_its_share(gpu):
    gpu(ours=16, others=36)
    assert kv_budget_bytes(CacheConfig(gpu_memory_utilization=0.45), CUDA) == (36 - 16) * GIB


def test_the_budget_never_includes_memory_of_others(gpu):
    gpu(ours=10, others=60)
    assert kv_budget_bytes(CacheConfig(gpu_memory_utilization=0.9), CUDA) == 10 * GIB - GIB // 2


def test_only_the_stream_of_steps_is_waited_for(monkeypatch):
    waited = []

    class Stream:
        def __init__(self, device):
            self.synchronize = lambda: waited.append(device)

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    synchronize(torch.device("cpu"))
    assert waited == []
    synchronize(CUDA)
    assert waited == [CUDA]
