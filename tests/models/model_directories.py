"""Tiny Hugging Face directories, made without torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mellmpi.models import Architecture, parameter_shapes
from mellmpi.models.random_model import write_byte_tokenizer

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 10000.0,
}


def tensors() -> dict[str, np.ndarray]:
    """Weights of `CONFIG`, all zero."""
    shapes = parameter_shapes(Architecture.from_hf(CONFIG))
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def write_model(directory: Path) -> Path:
    """Write a complete model: config.json, generation_config.json, model.safetensors, tokenizer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    save_file(tensors(), directory / "model.safetensors")
    write_byte_tokenizer(CONFIG["vocab_size"], directory)
    return directory


def write_shards(directory: Path, count: int) -> list[Path]:
    """Split the weights of a model of `write_model` into `count` files with an index."""
    (directory / "model.safetensors").unlink()
    weights = tensors()
    files = [directory / f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    placed = {name: files[index % count] for index, name in enumerate(weights)}
    for file in files:
        save_file({name: weights[name] for name in weights if placed[name] == file}, file)
    index = {"weight_map": {name: file.name for name, file in placed.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return files
