"""Rotary frequencies of an architecture (RoPE, arXiv 2104.09864), as transformers computes them."""

import math
from typing import Any

import numpy as np

from mellmpi.models.architecture import Architecture


def inv_freq(arch: Architecture) -> np.ndarray:
    """Rotary inverse frequencies with scaling applied, float32 [head_dim / 2].

    Computed in float32 in the order of transformers' `ROPE_INIT_FUNCTIONS`: at position 8,000 one
    unit in the last place of the first frequency changes the phase by 5e-4.
    """
    exponents = np.arange(0, arch.head_dim, 2, dtype=np.float32) / np.float32(arch.head_dim)
    # By float64, because numpy's float32 power is less exact than torch's.
    periods = np.power(np.float64(arch.rope_theta), exponents.astype(np.float64)).astype(np.float32)
    plain: np.ndarray = np.float32(1.0) / periods
    scaling = arch.rope_scaling
    if scaling is None:
        return plain
    match scaling["rope_type"]:
        case "linear":
            return plain / np.float32(scaling["factor"])
        case "llama3":
            return _llama3(plain, scaling)
        case _:
            return _yarn(periods, arch)


def _llama3(plain: np.ndarray, scaling: dict[str, Any]) -> np.ndarray:
    """Llama 3.1's scaling: low frequencies are divided by `factor`, high ones unchanged."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = np.float32(2 * math.pi) / plain
    slow = np.where(wavelength > context / low, plain / np.float32(factor), plain)
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    mixed = (1 - smooth) * slow / np.float32(factor) + smooth * slow
    medium = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(medium, mixed, slow).astype(np.float32)


def _yarn(periods: np.ndarray, arch: Architecture) -> np.ndarray:
    """YaRN (arXiv 2309.00071 §3.2): low frequencies are interpolated, high ones unchanged."""
    scaling = arch.rope_scaling or {}
    dim, context = arch.head_dim, scaling["original_max_position_embeddings"]

    def bound(rotations: float) -> float:
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(arch.rope_theta))

    low, high = bound(scaling.get("beta_fast") or 32), bound(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    unchanged = 1 - np.clip(ramp, 0, 1)
    interpolated = 1 / (np.float32(scaling["factor"]) * periods)
    blend: np.ndarray = interpolated * (1 - unchanged) + 1 / periods * unchanged
    return blend.astype(np.float32)


def attention_factor(arch: Architecture) -> float:
    """The factor of cosines and sines: YaRN's attention scaling, else 1."""
    scaling = arch.rope_scaling
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)
