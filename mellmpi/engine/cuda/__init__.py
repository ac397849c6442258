"""The forward pass of GPUs, in PyTorch; it runs on CPUs as well, as the yardstick of the kernels.

Knows nothing of where weights come from, nor of sampling.
"""

from mellmpi.engine.cuda.model import TorchModel

__all__ = [
    "TorchModel",
]
