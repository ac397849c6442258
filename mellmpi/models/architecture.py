"""The architecture of a model, read from a Hugging Face config.json."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mellmpi.models.config_values import flag, number, section, size, token_id, token_ids
from mellmpi.models.model_files import read_json, short
from mellmpi.models.rope_config import read_rope

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CLASS_NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# The defaults of transformers for a config.json without the key.
DEFAULT_MAX_POSITION = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
MOST_LAYERS = 10_000
REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and settings of a Llama-like decoder: all inputs of its forward pass except weights."""

    family: str  # one of FAMILIES
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int  # tokens of context
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # None: plain RoPE; else "rope_type" and its settings
    rms_norm_eps: float
    tie_embeddings: bool  # the output projection is the embedding matrix
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over head_dim of queries and keys, before RoPE
    sliding_window: int | None  # tokens that a position attends to, itself included; None: all
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "Architecture":
        """Read a config.json; ValueError names a key that is wrong or not supported."""
        family = _family(config)
        heads = size(config, "num_attention_heads")
        vocab_size = size(config, "vocab_size")
        attention_bias = family in ("llama", "qwen3") and flag(config, "attention_bias")
        theta, scaling = read_rope(config, DEFAULT_MAX_POSITION[family])
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
        """Read config.json, and more end-of-text tokens from generation_config.json.

        ValueError names the file and the wrong key.
        """
        return cls.from_file(directory / "config.json")

    @classmethod
    def from_file(cls, file: Path) -> "Architecture":
        """As `from_directory`, with any file name for config.json."""
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
        """ValueError for inconsistent sizes; it names the keys of config.json."""
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
