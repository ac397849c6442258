"""Assigns GPUs to workers, without importing torch."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from mellmpi.protocol import SCHEDULER


def count_gpus() -> int:
    """Return the number of GPUs that the CUDA driver shows (subject to CUDA_VISIBLE_DEVICES)."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


@dataclass(frozen=True)
class GpuAssignment:
    """The GPU of one worker. The workers of a host take its GPUs round-robin."""

    index: int  # among the workers of this host
    neighbours: int  # workers on this host, this one included
    num_gpus: int  # on this host

    @staticmethod
    def of(rank: int, neighbours: Sequence[int], num_gpus: int) -> "GpuAssignment":
        """Return the assignment of a worker. `neighbours`: all ranks of its host."""
        workers = [other for other in neighbours if other != SCHEDULER]
        return GpuAssignment(workers.index(rank), len(workers), num_gpus)

    @property
    def device(self) -> str:
        return f"cuda:{self.index % self.num_gpus}" if self.num_gpus else "cpu"

    @property
    def sharers(self) -> int:
        """Number of workers that use the same GPU, this one included."""
        if not self.num_gpus:
            return 1
        return len(range(self.index % self.num_gpus, self.neighbours, self.num_gpus))

    def problem(self, host: str, oversubscribe: bool) -> str:
        """Return a message if the host has too few GPUs, else ""."""
        if not self.num_gpus or oversubscribe or self.neighbours <= self.num_gpus:
            return ""
        return (
            f"{host} has {self.num_gpus} GPU(s) for {self.neighbours} workers: start one rank per "
            f"GPU and one more for the scheduler (mpirun -np {self.num_gpus + 1} …), or let "
            "workers share GPUs with --oversubscribe-gpus"
        )
