"""A GGUF file as a Hugging Face directory: config.json, model.safetensors, tokenizer.

Values are those that transformers' own GGUF loading gives in float32, bit for bit. Quantised
tensors are stored as float32, because no 16-bit type holds scale * q + minimum exactly and greedy
answers would change; float32, float16 and bfloat16 tensors are stored as they are.
"""

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize

from mellmpi.engine.architecture import Architecture, inv_freq
from mellmpi.engine.gguf_tokenizer import write_tokenizer
from mellmpi.engine.parameters import check_parameters

Progress = Callable[[str], None]

FAMILIES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
PERMUTED = ("llama", "mistral")  # families whose q and k rows llama.cpp interleaves for its RoPE
TOP = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip
IN_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
STORED = {  # GGUF type -> (safetensors type, numpy type of its bits); all others become float32
    GGMLQuantizationType.F16: ("F16", np.uint16),
    GGMLQuantizationType.BF16: ("BF16", np.uint16),
}
LLAMA3_CONTEXT = 8192  # Llama 3.1 and later: low and high frequency factor are 1 and 4


def convert(file: Path, directory: Path, progress: Progress) -> None:
    """Write `directory` from `file`; ValueError where this model is not one we can serve."""
    try:
        reader = GGUFReader(str(file))
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} is no GGUF file that can be read: {error}") from error
    metadata = Metadata(reader)
    tensors = {hf_name(t.name): t for t in reader.tensors if t.name != "rope_freqs.weight"}
    arch = architecture(metadata, tensors, _rope_factors(reader))
    shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in tensors.items()}
    check_parameters(shapes, arch, file.name)
    (directory / "config.json").write_text(json.dumps(arch.to_hf(), indent=1))
    (directory / "generation_config.json").write_text(
        json.dumps({"bos_token_id": arch.bos_id, "eos_token_id": list(arch.eos_ids)})
    )
    write_tokenizer(metadata.of_tokenizer(), directory)
    write_safetensors(tensors, arch, directory / "model.safetensors", progress)


class Metadata:
    """The key-value part of a GGUF file, as Python values."""

    def __init__(self, reader: GGUFReader):
        self._reader = reader
        self.family = self.get("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def model(self, key: str, default: Any = None) -> Any:
        """A value of the model's own section, such as `llama.block_count`."""
        return self.get(f"{self.family}.{key}", default)

    def of_tokenizer(self) -> dict[str, Any]:
        """`tokenizer.ggml.*` without the prefix, and `chat_template`."""
        prefix, template = "tokenizer.ggml.", self.get("tokenizer.chat_template")
        keys = [key for key in self._reader.fields if key.startswith(prefix)]
        found = {key.removeprefix(prefix): self.get(key) for key in keys}
        return found if template is None else {**found, "chat_template": template}


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    match stem.split("."):
        case ["blk", index, part] if part in IN_LAYER:
            return f"model.layers.{index}.{IN_LAYER[part]}.{kind}"
    return name  # unknown: `check_parameters` will say so


# --- the shape -----------------------------------------------------------------------------------


def architecture(
    metadata: Metadata, tensors: dict[str, ReaderTensor], rope_factors: np.ndarray | None
) -> Architecture:
    """What config.json would have said of this model."""
    family = FAMILIES.get(metadata.family)
    if family is None:
        raise ValueError(
            f"GGUF architecture {metadata.family!r} is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    config = _sizes(metadata, tensors) | {
        "model_type": family,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": "model.layers.0.self_attn.o_proj.bias" in tensors,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in tensors,
        "rope_theta": metadata.model("rope.freq_base", 10000.0),
        "rope_scaling": _scaling(metadata),
        "rms_norm_eps": metadata.model("attention.layer_norm_rms_epsilon"),
        "sliding_window": metadata.model("attention.sliding_window"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
    }
    arch = Architecture.from_hf(config)
    if rope_factors is None:
        return arch
    return Architecture.from_hf(config | {"rope_scaling": _llama3_scaling(arch, rope_factors)})


def _sizes(metadata: Metadata, tensors: dict[str, ReaderTensor]) -> dict[str, Any]:
    heads, hidden = metadata.model("attention.head_count"), metadata.model("embedding_length")
    return {
        "num_hidden_layers": metadata.model("block_count"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.model("attention.head_count_kv", heads),
        "head_dim": metadata.model("attention.key_length", hidden // heads),
        "intermediate_size": metadata.model("feed_forward_length"),
        "max_position_embeddings": metadata.model("context_length"),
        "vocab_size": int(tensors["model.embed_tokens.weight"].shape[-1]),
    }


def _end_tokens(metadata: Metadata) -> list[int]:
    """End of text, of turn and of message, as far as the file names them."""
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    return list(dict.fromkeys(i for key in keys if (i := metadata.get(key)) is not None))


def _scaling(metadata: Metadata) -> dict[str, Any] | None:
    kind = metadata.model("rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": metadata.model("rope.scaling.factor")}
    if (context := metadata.model("rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = context
    return scaling


def _rope_factors(reader: GGUFReader) -> np.ndarray | None:
    found = [t for t in reader.tensors if t.name == "rope_freqs.weight"]
    return dequantize(found[0].data, found[0].tensor_type).ravel() if found else None


def _llama3_scaling(arch: Architecture, factors: np.ndarray) -> dict[str, Any]:
    """The `llama3` numbers behind the divisors of the frequencies that a GGUF file stores."""
    scaling = {
        "rope_type": "llama3", "factor": round(float(factors.max()), 4),
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }  # fmt: skip
    plain = arch.to_hf() | {"rope_scaling": None}
    scaled = plain | {"rope_scaling": scaling}
    ratio = inv_freq(Architecture.from_hf(plain)) / inv_freq(Architecture.from_hf(scaled))
    if factors.shape != ratio.shape or not np.allclose(ratio, factors, rtol=1e-3):
        raise ValueError(
            "the rope_freqs of this GGUF file are not those of Llama 3.1 to 3.3; "
            "give the model's Hugging Face directory instead"
        )
    return scaling


# --- the weights ---------------------------------------------------------------------------------


def write_safetensors(
    tensors: dict[str, ReaderTensor], arch: Architecture, file: Path, progress: Progress
) -> None:
    """One tensor in memory at a time, however large the model: the header is known beforehand."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        dtype, bits = STORED.get(tensor.tensor_type, ("F32", np.uint32))
        shape = [int(n) for n in tensor.shape[::-1]]
        end = offset + math.prod(shape) * np.dtype(bits).itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    _check_space(file, offset)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for count, (name, tensor) in enumerate(tensors.items(), start=1):
            progress(f"converting tensor {count} of {len(tensors)}")
            stream.write(np.ascontiguousarray(_values(name, tensor, arch)).data)


def _check_space(file: Path, needed: int) -> None:
    free = shutil.disk_usage(file.parent).free
    if free < needed:
        raise ValueError(
            f"converting needs {needed / 1e9:.1f} GB in {file.parent.parent}, which has "
            f"{free / 1e9:.1f} GB left; choose another cache directory"
        )


def _values(name: str, tensor: ReaderTensor, arch: Architecture) -> np.ndarray:
    shape = tuple(int(n) for n in tensor.shape[::-1])
    if tensor.tensor_type in STORED:
        values = tensor.data.view(np.uint16).reshape(shape)
    else:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
    if arch.family in PERMUTED and ".q_proj." in name:
        return _unpermuted(values, arch.num_heads)
    if arch.family in PERMUTED and ".k_proj." in name:
        return _unpermuted(values, arch.num_kv_heads)
    return values


def _unpermuted(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the two halves of each head (convert_hf_to_gguf.py)."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)
