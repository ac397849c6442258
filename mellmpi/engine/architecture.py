"""The shape of a model, read from a Hugging Face config.json, and its rotary frequencies."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
CLASS_NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What transformers assumes where a config.json is silent.
DEFAULT_MAX_POSITION = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
REQUIRED = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything that the forward pass of one Llama-like decoder depends on, but the weights."""

    family: str  # one of FAMILIES
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int  # tokens of context the model was made for
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # None: plain RoPE; else has "rope_type" and its numbers
    rms_norm_eps: float
    tie_embeddings: bool  # the output projection is the embedding matrix
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over head_dim of queries and keys, before RoPE
    sliding_window: int | None  # a position sees itself and the window - 1 before it; None: all
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Architecture":
        """Read a config.json; ValueError says what is supported where this model is not."""
        family = _family(config)
        heads = config["num_attention_heads"]
        attention_bias = family in ("llama", "qwen3") and bool(config.get("attention_bias"))
        theta, scaling = _rope(config, family)
        arch = cls(
            family=family,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=_head_dim(config, family),
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_position=_max_position(config, family),
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias")),
            qk_norm=family == "qwen3",
            sliding_window=_sliding_window(config, family),
            bos_id=config.get("bos_token_id"),
            eos_ids=token_ids(config.get("eos_token_id")),
        )
        arch.check()
        return arch

    @classmethod
    def from_directory(cls, directory: Path) -> "Architecture":
        """Read config.json, with the end-of-text tokens of generation_config.json added."""
        config = json.loads((directory / "config.json").read_text())
        generation = directory / "generation_config.json"
        if generation.exists():
            more = json.loads(generation.read_text()).get("eos_token_id")
            known = token_ids(config.get("eos_token_id"))
            config["eos_token_id"] = list(dict.fromkeys(known + token_ids(more)))
        return cls.from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """The config.json that `from_hf` reads back as this architecture."""
        config: dict[str, Any] = {
            "architectures": [CLASS_NAMES[self.family]],
            "model_type": self.family,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position,
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.o_bias,
            "mlp_bias": self.mlp_bias,
            "sliding_window": self.sliding_window,
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_ids),
        }
        if self.family.startswith("qwen"):
            config["use_sliding_window"] = self.sliding_window is not None
            config["max_window_layers"] = 0
        return config

    def check(self) -> None:
        """Refuse shapes that cannot be, with the key of config.json to look at."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """An eos_token_id of config.json, which is a number, a list or null, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _family(config: dict[str, Any]) -> str:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)} "
            "(Llama 2 and 3, SmolLM, Mistral, Qwen2, Qwen2.5, Qwen3)"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"this checkpoint is quantised ({method}); supported are float32, bfloat16 and "
            "float16 safetensors, and GGUF files of any type"
        )
    if missing := [key for key in REQUIRED if key not in config]:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act {act!r} is not supported; supported is silu")
    return str(family)


def _head_dim(config: dict[str, Any], family: str) -> int:
    default = 128 if family == "qwen3" else config["hidden_size"] // config["num_attention_heads"]
    return config.get("head_dim") or default


def _max_position(config: dict[str, Any], family: str) -> int:
    return config.get("max_position_embeddings") or DEFAULT_MAX_POSITION[family]


def _sliding_window(config: dict[str, Any], family: str) -> int | None:
    default = 4096 if family != "llama" else None
    window = config.get("sliding_window", default)
    if family == "llama" or (family != "mistral" and not config.get("use_sliding_window")):
        return None
    if window is None or window >= _max_position(config, family):
        return None
    first = 0 if family == "mistral" else config.get("max_window_layers", 28)
    if first >= config["num_hidden_layers"]:
        return None
    if first > 0:
        raise ValueError(
            f"max_window_layers {first}: a sliding window on some layers only is not supported; "
            "set use_sliding_window to false in config.json, or use a window on all layers"
        )
    return int(window)


# --- rotary embeddings ---------------------------------------------------------------------------


def _rope(config: dict[str, Any], family: str) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_scaling` (before)."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    partial = given.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor {partial} is not supported; supported is 1.0")
    if kind == "default":
        return float(theta), None
    if kind in ("llama3", "yarn"):
        outside = config.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = (
            outside or given.get("original_max_position_embeddings")
            or _max_position(config, family)
        )  # fmt: skip
    required = (
        ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    )
    if missing := [key for key in required if given.get(key) is None]:
        raise ValueError(f"rope type {kind!r} lacks {', '.join(missing)} in config.json")
    return float(theta), {"rope_type": kind, **given}


def inv_freq(arch: Architecture) -> np.ndarray:
    """Rotary inverse frequencies, float32 [head_dim / 2], scaling applied.

    Computed in float32 in the order of transformers' `ROPE_INIT_FUNCTIONS`: at position 8,000 one
    unit in the last place of the first frequency is already 5e-4 of phase.
    """
    exponents = np.arange(0, arch.head_dim, 2, dtype=np.float32) / np.float32(arch.head_dim)
    # Through float64, because numpy's float32 power is less exact than torch's.
    periods = np.power(np.float64(arch.rope_theta), exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1.0) / periods
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
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = np.float32(2 * math.pi) / plain
    slow = np.where(wavelength > context / low, plain / np.float32(factor), plain)
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    mixed = (1 - smooth) * slow / np.float32(factor) + smooth * slow
    medium = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(medium, mixed, slow).astype(np.float32)


def _yarn(periods: np.ndarray, arch: Architecture) -> np.ndarray:
    """YaRN (arXiv 2309.00071 §3.2): long waves are interpolated, short ones kept."""
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
    kept = 1 - np.clip(ramp, 0, 1)
    interpolated = 1 / (np.float32(scaling["factor"]) * periods)
    return (interpolated * (1 - kept) + 1 / periods * kept).astype(np.float32)


def attention_factor(arch: Architecture) -> float:
    """What cosines and sines are multiplied by: 1 but for YaRN."""
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
