"""The forward pass of CPUs: compiled kernels, packed weights, threads.

Knows nothing of where weights come from, nor of sampling.
"""

from mellmpi.engine.cpu.model import CpuModel, unsupported

__all__ = [
    "CpuModel",
    "unsupported",
]
