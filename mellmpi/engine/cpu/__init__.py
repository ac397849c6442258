"""The forward pass on CPUs: compiled kernels, packed weights, threads.

Knows nothing of weight files or of sampling.
"""

from mellmpi.engine.cpu.model import CpuModel, unsupported

__all__ = [
    "CpuModel",
    "unsupported",
]
