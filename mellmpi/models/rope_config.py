"""The rotary embedding settings of a config.json, checked."""

from typing import Any

from mellmpi.models.config_values import Config, flag, number, section, size
from mellmpi.models.model_files import short

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
MIN_THETA = 1.001  # frequencies divide by its logarithm


def read_rope(config: Config, default_context: int) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_scaling` (transformers 4).

    default_context  `max_position_embeddings` in tokens, where the config has none
    ValueError       names an unsupported type, or a value that is missing or out of range
    """
    given = section(config, "rope_parameters") or section(config, "rope_scaling")
    top_level = number(config, "rope_theta", default=10000.0, least=MIN_THETA)
    theta = number(given, "rope_theta", default=top_level, least=MIN_THETA)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    for key in ("rope_theta", "type"):
        given.pop(key, None)
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"rope type {short(kind)} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    partial = given.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise ValueError(
            f"partial_rotary_factor {short(partial)} is not supported; supported is 1.0"
        )
    if kind == "default":
        _refuse_untyped_scaling(given)
        return float(theta), None
    if kind in ("llama3", "yarn"):
        context = "original_max_position_embeddings"
        longest = size(config, "max_position_embeddings", default=default_context)
        trained = number(given, context, default=longest, least=1)
        given[context] = number(config, context, default=trained, least=1)
    _check_scaling(kind, given)
    return float(theta), {"rope_type": kind, **given}


def _refuse_untyped_scaling(given: dict[str, Any]) -> None:
    """ValueError for a scaling without a type, which would be ignored silently."""
    # Nested objects are scalings for each kind of layer.
    nested = any(isinstance(value, dict) for value in given.values())
    if nested or number(given, "factor", default=1.0) != 1:
        raise ValueError(
            f"rope_scaling {short(given)} has no rope_type that scales; supported are "
            f"{', '.join(ROPE_TYPES)}, one for all layers"
        )


def _check_scaling(kind: str, given: dict[str, Any]) -> None:
    """ValueError unless the numbers in `given` are complete and give finite frequencies."""
    required = ["factor"] + ["low_freq_factor", "high_freq_factor"] * (kind == "llama3")
    if missing := [key for key in required if given.get(key) is None]:
        raise ValueError(f"rope type {kind!r} lacks {', '.join(missing)}")
    for key in (*required, "beta_fast", "beta_slow", "attention_factor"):
        number(given, key, default=1.0, least=1e-3)
    for key in ("mscale", "mscale_all_dim"):
        number(given, key, default=0.0, least=0.0)
    flag(given, "truncate")
    if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ValueError("rope type 'llama3' needs low_freq_factor < high_freq_factor")
