"""The shape of a model, read from a Hugging Face config.json, and its rotary frequencies."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mellmpi.models.config_values import flag, number, section, size, token_id, token_ids
from mellmpi.models.model_files import read_json, short

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
MOST_LAYERS = 10_000
MIN_THETA = 1.001  # its logarithm divides
REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)


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
        heads = size(config, "num_attention_heads")
        vocab_size = size(config, "vocab_size")
        attention_bias = family in ("llama", "qwen3") and flag(config, "attention_bias")
        theta, scaling = _rope(config, family)
        arch = cls(
            family=family,
            num_layers=size(config, "num_hidden_layers", most=MOST_LAYERS),
            hidden_size=size(config, "hidden_size"),
            num_heads=heads,
            num_kv_heads=size(config, "num_key_value_heads", default=heads),
            head_dim=_head_dim(config, family),
            intermediate_size=size(config, "intermediate_size"),
            vocab_size=vocab_size,
            max_position=_max_position(config, family),
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=float(number(config, "rms_norm_eps", default=1e-6, least=1e-30, most=1)),
            tie_embeddings=flag(config, "tie_word_embeddings"),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family == "llama" and flag(config, "mlp_bias"),
            qk_norm=family == "qwen3",
            sliding_window=_sliding_window(config, family),
            bos_id=token_id(config, "bos_token_id"),
            eos_ids=token_ids(config, "eos_token_id", vocab_size),
        )
        arch.check()
        return arch

    @classmethod
    def from_directory(cls, directory: Path) -> "Architecture":
        """Read config.json, with the end-of-text tokens of generation_config.json added.

        ValueError names the file and the key at fault.
        """
        return cls.from_file(directory / "config.json")

    @classmethod
    def from_file(cls, file: Path) -> "Architecture":
        """As `from_directory`, for a config.json of any name."""
        generation = file.parent / "generation_config.json"
        config = read_json(file)
        try:
            arch = cls.from_hf(config)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if not generation.exists():
            return arch
        more = read_json(generation)
        try:
            added = token_ids(more, "eos_token_id", arch.vocab_size)
        except ValueError as error:
            raise ValueError(f"{generation}: {error}") from error
        return replace(arch, eos_ids=tuple(dict.fromkeys(arch.eos_ids + added)))

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


def _family(config: dict[str, Any]) -> str:
    family = config.get("model_type")
    if family not in FAMILIES or config.get("text_config"):
        kind = "multimodal " if config.get("text_config") else ""
        raise ValueError(
            f"{kind}model_type {short(family)} is not supported; supported are "
            f"{', '.join(FAMILIES)} (Llama 2 and 3, SmolLM, Mistral, Qwen2, Qwen2.5, Qwen3)"
        )
    for key in ("quantization_config", "compression_config"):
        if settings := section(config, key):
            method = settings.get("quant_method", "unknown")
            raise ValueError(
                f"this checkpoint is quantised ({method}); supported are float32, bfloat16 "
                "and float16 safetensors, and GGUF files of any type"
            )
    if missing := [key for key in REQUIRED if key not in config]:
        raise ValueError(f"lacks {', '.join(missing)}")
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act {short(act)} is not supported; supported is silu")
    return str(family)


def _head_dim(config: dict[str, Any], family: str) -> int:
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    if config.get("head_dim") is None and family != "qwen3" and hidden % heads:
        raise ValueError(
            f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads})"
        )
    return size(config, "head_dim", default=128 if family == "qwen3" else hidden // heads)


def _max_position(config: dict[str, Any], family: str) -> int:
    return size(config, "max_position_embeddings", default=DEFAULT_MAX_POSITION[family])


def _sliding_window(config: dict[str, Any], family: str) -> int | None:
    if family == "llama" or (family != "mistral" and not flag(config, "use_sliding_window")):
        return None
    if config.get("sliding_window", 4096) is None:
        return None
    window = size(config, "sliding_window", default=4096)
    if window >= _max_position(config, family):
        return None
    first = 0 if family == "mistral" else number(config, "max_window_layers", 28, least=0)
    if first >= size(config, "num_hidden_layers"):
        return None
    if first > 0:
        raise ValueError(
            f"max_window_layers {first}: a sliding window on some layers only is not supported; "
            "set use_sliding_window to false in config.json, or use a window on all layers"
        )
    return window


# --- rotary embeddings ---------------------------------------------------------------------------


def _rope(config: dict[str, Any], family: str) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_scaling` (before)."""
    given = section(config, "rope_parameters") or section(config, "rope_scaling")
    outside = number(config, "rope_theta", default=10000.0, least=MIN_THETA)
    theta = number(given, "rope_theta", default=outside, least=MIN_THETA)
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
        _refuse_forgotten_type(given)
        return float(theta), None
    if kind in ("llama3", "yarn"):
        context = "original_max_position_embeddings"
        trained = number(given, context, default=_max_position(config, family), least=1)
        given[context] = number(config, context, default=trained, least=1)
    _check_scaling(kind, given)
    return float(theta), {"rope_type": kind, **given}


def _refuse_forgotten_type(given: dict[str, Any]) -> None:
    """ValueError for a scaling that would be ignored silently."""
    nested = any(isinstance(value, dict) for value in given.values())  # one for each kind of layer
    if nested or number(given, "factor", default=1.0) != 1:
        raise ValueError(
            f"rope_scaling {short(given)} has no rope_type that scales; supported are "
            f"{', '.join(ROPE_TYPES)}, one for all layers"
        )


def _check_scaling(kind: str, given: dict[str, Any]) -> None:
    """ValueError unless the numbers in `given` are there and give finite frequencies."""
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
