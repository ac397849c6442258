"""Models as people have them: found, checked, described and, where necessary, converted.

Knows no torch: rank 0 finds the faults of a model before any worker starts.
"""

from mellmpi.models.architecture import Architecture, attention_factor, inv_freq
from mellmpi.models.checkpoint import RANDOM_WEIGHTS, resolve
from mellmpi.models.parameters import check_parameters, parameter_shapes, tensor_seed
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
