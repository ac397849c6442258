"""Model files: located, checked, described and, if necessary, converted.

Knows no torch, so that rank 0 can check a model before any worker starts.
"""

from mellmpi.models.architecture import Architecture
from mellmpi.models.checkpoint import RANDOM_WEIGHTS, resolve
from mellmpi.models.parameters import check_parameters, parameter_shapes, tensor_seed
from mellmpi.models.rope import attention_factor, inv_freq
from mellmpi.models.weight_files import parameter_name, weight_files

__all__ = [
    "RANDOM_WEIGHTS",
    "Architecture",
    "attention_factor",
    "check_parameters",
    "inv_freq",
    "parameter_name",
    "parameter_shapes",
    "resolve",
    "tensor_seed",
    "weight_files",
]
