"""The forward pass on GPUs, in PyTorch; on CPUs it is the reference for the kernels.

Knows nothing of weight files or of sampling.
"""

from mellmpi.engine.cuda.model import TorchModel

__all__ = [
    "TorchModel",
]
