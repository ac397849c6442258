"""Names and shapes of a model's weights, as Hugging Face checkpoints have them."""

import hashlib
from collections.abc import Mapping

from mellmpi.models.architecture import Architecture

Shape = tuple[int, ...]


def parameter_shapes(arch: Architecture) -> dict[str, Shape]:
    """The shape of every weight by name; matrices are [out, in]. Tied models have no lm_head."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (arch.vocab_size, arch.hidden_size)}
    for index in range(arch.num_layers):
        for name, shape in _layer(arch).items():
            shapes[f"model.layers.{index}.{name}"] = shape
    shapes["model.norm.weight"] = (arch.hidden_size,)
    if not arch.tie_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, arch.hidden_size)
    return shapes


def _layer(arch: Architecture) -> dict[str, Shape]:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    shapes: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        if arch.qkv_bias:
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    shapes["self_attn.o_proj.weight"] = (hidden, q)
    if arch.o_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if arch.qk_norm:
        shapes |= {f"self_attn.{name}_norm.weight": (arch.head_dim,) for name in "qk"}
    shapes["post_attention_layernorm.weight"] = (hidden,)
    for name, rows, columns in (
        ("gate", inner, hidden),
        ("up", inner, hidden),
        ("down", hidden, inner),
    ):
        shapes[f"mlp.{name}_proj.weight"] = (rows, columns)
        if arch.mlp_bias:
            shapes[f"mlp.{name}_proj.bias"] = (rows,)
    return shapes


def check_parameters(found: Mapping[str, Shape], arch: Architecture, source: str) -> None:
    """ValueError names the missing, unexpected and misshaped weights of `source`."""
    expected = parameter_shapes(arch)
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshaped = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    listed = [f"{len(names)} {kind} ({_few(names)})" for kind, names in faults.items() if names]
    if listed:
        raise ValueError(
            f"the weights of {source} do not fit its configuration: {'; '.join(listed)}; copy or "
            "download the whole model again"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def tensor_seed(seed: int, name: str) -> int:
    """The seed of one tensor, a function of the run's seed and the tensor's name only."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little")
