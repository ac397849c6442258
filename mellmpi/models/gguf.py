"""Conversion of a GGUF file to a Hugging Face directory: config.json, weights, tokenizer.

Values equal those of transformers' GGUF loading in float32, bit for bit. Quantised tensors are
stored as float32, because no 16-bit type holds scale * q + minimum exactly, and greedy answers
would change; float32, float16 and bfloat16 tensors keep their type.
"""

import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from mellmpi.models.architecture import Architecture
from mellmpi.models.config_values import Config, number, size, token_id
from mellmpi.models.gguf_file import OTHER_KINDS, GgufTensor, read_gguf
from mellmpi.models.gguf_tokenizer import write_tokenizer
from mellmpi.models.model_files import short
from mellmpi.models.parameters import check_parameters
from mellmpi.models.rope import inv_freq

Progress = Callable[[str], None]

FAMILIES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}
PERMUTED = ("llama", "mistral")  # families whose q and k rows llama.cpp interleaves for its RoPE
TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
STORED = {  # GGUF type -> (safetensors type, numpy type of its bits); others become float32
    GGMLQuantizationType.F16: ("F16", np.uint16),
    GGMLQuantizationType.BF16: ("BF16", np.uint16),
}
PART = r"-(\d{5})-of-(\d{5})$"  # the end of the name of one file of a split model
LLAMA3_CONTEXT = 8192  # Llama 3.1 and later: low and high frequency factor are 1 and 4


def convert(file: Path, directory: Path, progress: Progress) -> None:
    """Convert `file` into `directory`; ValueError names the file and why it cannot be served."""
    try:
        _convert(file, directory, progress)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _convert(file: Path, directory: Path, progress: Progress) -> None:
    metadata, found = read_gguf(file)
    check_kind(metadata, found, file)
    rope_freqs = found.pop("rope_freqs.weight", None)
    tensors = {hf_name(name): tensor for name, tensor in found.items()}
    arch = architecture(metadata, tensors, rope_freqs)
    check_parameters({name: t.shape for name, t in tensors.items()}, arch, file.name)
    (directory / "config.json").write_text(json.dumps(arch.to_hf(), indent=1))
    (directory / "generation_config.json").write_text(
        json.dumps({"bos_token_id": arch.bos_id, "eos_token_id": list(arch.eos_ids)})
    )
    write_tokenizer(tokenizer_metadata(metadata), arch.vocab_size, directory)
    write_safetensors(tensors, arch, directory / "model.safetensors", progress)


def check_kind(metadata: Config, tensors: dict[str, GgufTensor], file: Path) -> None:
    """ValueError unless this is a complete model of a supported family and tensor types."""
    part = re.search(PART, file.stem)
    if size(metadata, "split.count", default=1) > 1 or (part and int(part[2]) > 1):
        first = file.with_stem(re.sub(PART, r"-00001-of-\2", file.stem))
        whole = file.with_stem(re.sub(PART, "", file.stem) + "-merged")
        raise ValueError(
            f"is one part of a split model: join them with llama.cpp's llama-gguf-split --merge "
            f"{first} {whole}, and give that file"
        )
    kind, family = metadata.get("general.type", "model"), metadata.get("general.architecture")
    if kind != "model":
        raise ValueError(f"is not a language model but of the type {short(kind)}: give the model")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"holds a model of the GGUF architecture {short(family)}, which is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    for name, tensor in tensors.items():
        _check_type(name, tensor.kind)


def _check_type(name: str, kind: GGMLQuantizationType) -> None:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        raise ValueError(
            f"holds {short(name)} in the type {kind.name}, which is not supported: {OTHER_KINDS}"
        ) from error


def tokenizer_metadata(metadata: Config) -> dict[str, Any]:
    """`tokenizer.ggml.*` without the prefix, and `chat_template`."""
    prefix, template = "tokenizer.ggml.", metadata.get("tokenizer.chat_template")
    found = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    return found if template is None else {**found, "chat_template": template}


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP_LEVEL:
        return f"{TOP_LEVEL[stem]}.{kind}"
    match stem.split("."):
        case ["blk", index, part] if part in IN_LAYER:
            return f"model.layers.{index}.{IN_LAYER[part]}.{kind}"
    return name  # unknown; `check_parameters` reports it


# --- config.json ---------------------------------------------------------------------------------


def architecture(
    metadata: Config, tensors: dict[str, GgufTensor], rope_freqs: GgufTensor | None
) -> Architecture:
    """The architecture that the metadata and the tensors describe."""
    section = metadata["general.architecture"]
    config = _sizes(metadata, section, tensors) | {
        "model_type": FAMILIES[section],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": "model.layers.0.self_attn.o_proj.bias" in tensors,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in tensors,
        "rope_theta": metadata.get(f"{section}.rope.freq_base", 10000.0),
        "rope_scaling": _scaling(metadata, section),
        "rms_norm_eps": number(metadata, f"{section}.attention.layer_norm_rms_epsilon", least=0),
        "sliding_window": metadata.get(f"{section}.attention.sliding_window"),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_tokens(metadata),
    }
    arch = Architecture.from_hf(config)
    if rope_freqs is None:
        return arch
    factors = dequantize(rope_freqs.data, rope_freqs.kind).ravel()
    return Architecture.from_hf(config | {"rope_scaling": _llama3_scaling(arch, factors)})


def _sizes(metadata: Config, section: str, tensors: dict[str, GgufTensor]) -> dict[str, int]:
    embeddings = tensors.get("model.embed_tokens.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise ValueError("has no matrix token_embd.weight: copy or download it again")
    heads = size(metadata, f"{section}.attention.head_count")
    hidden = size(metadata, f"{section}.embedding_length")
    return {
        "num_hidden_layers": size(metadata, f"{section}.block_count"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": size(metadata, f"{section}.attention.head_count_kv", heads),
        "head_dim": size(metadata, f"{section}.attention.key_length", hidden // heads),
        "intermediate_size": size(metadata, f"{section}.feed_forward_length"),
        "max_position_embeddings": size(metadata, f"{section}.context_length"),
        "vocab_size": embeddings.shape[0],
    }


def _end_tokens(metadata: Config) -> list[Any]:
    """The end tokens of text, turn and message that the file names."""
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    return list({i: None for key in keys if (i := token_id(metadata, key)) is not None})


def _scaling(metadata: Config, section: str) -> dict[str, Any] | None:
    kind = metadata.get(f"{section}.rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": metadata.get(f"{section}.rope.scaling.factor")}
    if (context := metadata.get(f"{section}.rope.scaling.original_context_length")) is not None:
        scaling["original_max_position_embeddings"] = context
    return scaling


def _llama3_scaling(arch: Architecture, factors: np.ndarray) -> dict[str, Any]:
    """The `llama3` settings that give the frequency divisors of a GGUF file.

    factors     float32 [head_dim / 2]
    ValueError  no such settings give them
    """
    scaling = {
        "rope_type": "llama3",
        "factor": round(float(factors.max()), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
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
    tensors: dict[str, GgufTensor], arch: Architecture, file: Path, progress: Progress
) -> None:
    """Write a model.safetensors with one tensor in memory at a time: the header comes first."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        dtype, bits = STORED.get(tensor.kind, ("F32", np.uint32))
        end = offset + math.prod(tensor.shape) * np.dtype(bits).itemsize
        header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
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
            f"{free / 1e9:.1f} GB left; choose another cache directory with --cache-dir DIR"
        )


def _values(name: str, tensor: GgufTensor, arch: Architecture) -> np.ndarray:
    """The tensor's values in its shape: float32, or uint16 for the bits of a type in `STORED`."""
    values: np.ndarray
    if tensor.kind in STORED:
        values = tensor.data.view(np.uint16)
    else:
        values = dequantize(tensor.data, tensor.kind).astype(np.float32).reshape(tensor.shape)
    if arch.family in PERMUTED and ".q_proj." in name:
        return _unpermuted(values, arch.num_heads)
    if arch.family in PERMUTED and ".k_proj." in name:
        return _unpermuted(values, arch.num_kv_heads)
    return values


def _unpermuted(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the halves of heads (convert_hf_to_gguf.py, `permute`)."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)
