"""Conversion of Hugging Face tensors to the packed weights and sizes of the kernels."""

from collections.abc import Iterator

import numpy as np
import torch

from mellmpi.engine.cpu.packed_weights import (
    activation_dtype,
    interleaved,
    large_pages,
    packed,
    pad_to,
    padded,
    padded_stride,
    storage,
)
from mellmpi.engine.cpu.shapes import Sizes, Weights
from mellmpi.engine.cpu.tuning import widen_from
from mellmpi.engine.cpu.vectors import LANES
from mellmpi.models import Architecture

Tensors = dict[str, torch.Tensor]


def sizes_of(arch: Architecture, dtype: torch.dtype) -> Sizes:
    """The kernels' sizes of a model with weights of this dtype."""
    hidden, inner = padded(arch.hidden_size), padded(arch.intermediate_size)
    itemsize = activation_dtype(dtype).itemsize
    return Sizes(
        layers=arch.num_layers,
        size=arch.hidden_size,
        hidden=hidden,
        inner=inner,
        qkv=padded((arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim),
        vocabulary=padded(arch.vocab_size),
        normed_stride=padded_stride(hidden, itemsize),
        attended_stride=padded_stride(arch.num_heads * arch.head_dim, itemsize),
        inner_stride=padded_stride(inner, itemsize),
        tied=arch.tie_embeddings,
        widen_from=widen_from(dtype),
    )


def take_weights(arch: Architecture, tensors: Tensors, dtype: torch.dtype) -> Weights:
    """Pack all weights. Empties `tensors` on the way, to hold the weights in memory once only."""
    sizes = sizes_of(arch, dtype)
    norms, head_norms = _take_norms(arch, tensors, sizes)
    biases, bias_begins = _take_biases(arch, tensors, sizes)
    embedding = tensors.pop("model.embed_tokens.weight").to(dtype)
    output = embedding if arch.tie_embeddings else tensors.pop("lm_head.weight")
    shapes = _shapes(arch, sizes)
    matrices, begins = packed(
        _take_matrices(arch, tensors, dtype, shapes, output), [rows * k for rows, k in shapes]
    )
    return Weights(
        matrices=matrices,
        begins=begins,
        embedding=matrices if arch.tie_embeddings else _rows(embedding),
        biases=biases,
        bias_begins=bias_begins,
        norms=norms,
        head_norms=head_norms,
    )


def _shapes(arch: Architecture, sizes: Sizes) -> list[tuple[int, int]]:
    """[outputs, inputs] of each matrix, padded: qkv, o, gate-up, down of every layer; output."""
    layer = [
        (sizes.qkv, sizes.hidden),
        (sizes.hidden, arch.num_heads * arch.head_dim),
        (2 * sizes.inner, sizes.hidden),
        (sizes.hidden, sizes.inner),
    ]
    return layer * arch.num_layers + [(sizes.vocabulary, sizes.hidden)]


def _take_matrices(
    arch: Architecture,
    tensors: Tensors,
    dtype: torch.dtype,
    shapes: list[tuple[int, int]],
    output: torch.Tensor,
) -> Iterator[torch.Tensor]:
    for index in range(arch.num_layers):
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        qkv, o, gate_up, down = shapes[:4]
        matrix = torch.cat([tensors.pop(f"{attention}.{x}_proj.weight") for x in "qkv"])
        yield pad_to(matrix.to(dtype), *qkv)
        yield pad_to(tensors.pop(f"{attention}.o_proj.weight").to(dtype), *o)
        halves = (tensors.pop(f"{mlp}.{x}_proj.weight").to(dtype) for x in ("gate", "up"))
        yield interleaved(*(pad_to(x, gate_up[0] // 2, gate_up[1]) for x in halves))
        yield pad_to(tensors.pop(f"{mlp}.down_proj.weight").to(dtype), *down)
    yield pad_to(output.to(dtype), *shapes[-1])


def _take_biases(
    arch: Architecture, tensors: Tensors, sizes: Sizes
) -> tuple[np.ndarray, np.ndarray]:
    """All biases, after zeros for the matrices without; int64 [matrices]: the start of each."""
    widths = (sizes.qkv, sizes.hidden, 2 * sizes.inner, sizes.hidden)
    parts = [torch.zeros(max(*widths, sizes.vocabulary))]
    begins = np.zeros(4 * arch.num_layers + 1, np.int64)
    for index in range(arch.num_layers):
        for matrix, bias in enumerate(_layer_biases(arch, tensors, index, sizes.inner)):
            if bias is not None:
                begins[4 * index + matrix] = sum(map(len, parts))
                parts.append(pad_to(bias.float(), widths[matrix]))
    return torch.cat(parts).numpy(), begins


def _layer_biases(
    arch: Architecture, tensors: Tensors, index: int, inner: int
) -> list[torch.Tensor | None]:
    attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
    found: list[torch.Tensor | None] = [None] * 4
    if arch.qkv_bias:
        found[0] = torch.cat([tensors.pop(f"{attention}.{x}_proj.bias") for x in "qkv"])
    if arch.o_bias:
        found[1] = tensors.pop(f"{attention}.o_proj.bias")
    if arch.mlp_bias:
        gate, up = (pad_to(tensors.pop(f"{mlp}.{x}_proj.bias"), inner) for x in ("gate", "up"))
        found[2], found[3] = interleaved(gate, up), tensors.pop(f"{mlp}.down_proj.bias")
    return found


def _take_norms(
    arch: Architecture, tensors: Tensors, sizes: Sizes
) -> tuple[np.ndarray, np.ndarray]:
    names = [
        f"model.layers.{index}.{norm}.weight"
        for index in range(arch.num_layers)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    norms = [pad_to(tensors.pop(n).float(), sizes.hidden) for n in [*names, "model.norm.weight"]]
    heads = [torch.zeros(LANES)]
    if arch.qk_norm:
        heads = [
            tensors.pop(f"model.layers.{index}.self_attn.{x}_norm.weight").float()
            for index in range(arch.num_layers)
            for x in "qk"
        ]
    return torch.cat(norms).numpy(), torch.cat(heads).numpy()


def _rows(matrix: torch.Tensor) -> np.ndarray:
    """An untied embedding [vocabulary, size], flat, not packed, in large pages."""
    memory = large_pages(matrix.numel(), matrix.dtype)
    memory[: matrix.numel()].view(matrix.shape).copy_(matrix)
    return storage(memory)
