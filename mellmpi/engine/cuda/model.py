"""The Llama family in plain torch: for CUDA devices, and the reference for the CPU kernels."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mellmpi.engine.cuda.attention import Group, batched_attention, group_chunks, make_group
from mellmpi.engine.device import copy_ints
from mellmpi.engine.kv_arena import KvArena
from mellmpi.engine.packing import PackedBatch
from mellmpi.models import Architecture, attention_factor, inv_freq

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Linear:
    """weight [out, in], bias [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def take_linear(weights: Weights, *names: str) -> Linear:
    """Projections of one input joined into one. Removes them from `weights`, to free memory."""
    parts = [weights.pop(f"{name}.weight") for name in names]
    biases = [weights.pop(f"{name}.bias") for name in names if f"{name}.bias" in weights]
    assert len(biases) in (0, len(names)), f"some of {', '.join(names)} have a bias, some have none"
    if len(names) == 1:
        return Linear(parts[0], biases[0] if biases else None)
    return Linear(torch.cat(parts), torch.cat(biases) if biases else None)


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one decoder layer; norms are [hidden], of queries and keys [head_dim]."""

    attention_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


def take_layer(weights: Weights, index: int) -> Layer:
    """The weights of layer `index`; removes them from `weights`."""
    name = f"model.layers.{index}"
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    return Layer(
        attention_norm=weights.pop(f"{name}.input_layernorm.weight"),
        qkv=take_linear(weights, *(f"{attention}.{x}_proj" for x in "qkv")),
        q_norm=weights.pop(f"{attention}.q_norm.weight", None),
        k_norm=weights.pop(f"{attention}.k_norm.weight", None),
        o=take_linear(weights, f"{attention}.o_proj"),
        mlp_norm=weights.pop(f"{name}.post_attention_layernorm.weight"),
        gate_up=take_linear(weights, f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        down=take_linear(weights, f"{mlp}.down_proj"),
    )


@dataclass(frozen=True, slots=True)
class Step:
    """One batch of T rows on the device, ready for all layers.

    tokens         int64 [T]
    cos, sin       [T, 1, head_dim]     in the model's dtype
    blocks, slots  int64 [T]            the place of each row's KV
    groups         the groups of chunks for attention
    last_rows      int64 [num_sampled]  the rows that need logits
    """

    tokens: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    blocks: torch.Tensor
    slots: torch.Tensor
    groups: list[Group]
    last_rows: torch.Tensor


class TorchModel:
    """One decoder on one device; empties `weights`, to hold them in memory once only."""

    warm_up_s = 0.0  # there is none

    def __init__(
        self, arch: Architecture, weights: Weights, dtype: torch.dtype, device: torch.device | str
    ):
        self.arch, self.dtype, self.device = arch, dtype, torch.device(device)
        kind = torch.cuda.get_device_name(device) if self.device.type == "cuda" else "a CPU"
        self.arithmetic = (
            f"{str(dtype).removeprefix('torch.')} by PyTorch {torch.__version__} on {kind}"
        )
        for name in list(weights):
            weights[name] = weights[name].to(self.device, dtype)
        self.layers = [take_layer(weights, i) for i in range(arch.num_layers)]
        self.embedding = weights.pop("model.embed_tokens.weight")
        self.norm = weights.pop("model.norm.weight")
        self.head = self.embedding if arch.tie_embeddings else weights.pop("lm_head.weight")
        self._inv_freq = torch.from_numpy(inv_freq(arch)).to(self.device)
        self._cos_scale = attention_factor(arch)
        self._scored: torch.Tensor | None = None  # [T, hidden] of the last batch if it `is_scored`

    @torch.inference_mode()
    def forward(self, batch: PackedBatch, arena: KvArena) -> torch.Tensor:
        """Compute all rows and write their K and V into the arena.

        Returns the logits of the sampled rows, float32 [num_sampled, vocab], on the model's device;
        the step may still be running there.
        """
        step = self._prepare(batch, arena.block_size)
        x = self.embedding[step.tokens]
        for index, layer in enumerate(self.layers):
            x = x + self._attend(layer, self._norm(x, layer.attention_norm), index, step, arena)
            gate, up = layer.gate_up(self._norm(x, layer.mlp_norm)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        self._scored = x if batch.is_scored else None
        return self._logits(x[step.last_rows])

    @torch.inference_mode()
    def logits_of(self, rows: np.ndarray) -> torch.Tensor:
        """Logits of rows int32 [n] of the last batch, which `is_scored`: float32 [n, vocab]."""
        assert self._scored is not None, "the last batch is not scored"
        return self._logits(self._scored[torch.from_numpy(rows).to(self.device)])

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> float32 [n, vocab]"""
        return F.linear(self._norm(x, self.norm), self.head).float()

    def _prepare(self, batch: PackedBatch, block_size: int) -> Step:
        """The inputs that depend on the plan only: the one host → device copy of a step."""
        chunk_of_row = np.repeat(np.arange(batch.num_chunks), np.diff(batch.cu_chunks))
        row_blocks = batch.block_tables[chunk_of_row, batch.positions // block_size]
        row_slots = batch.positions % block_size
        grouped = [array for pair in group_chunks(batch, block_size) for array in pair]
        tokens, positions, blocks, slots, last_rows, *groups = copy_ints(
            [batch.tokens, batch.positions, row_blocks, row_slots, batch.last_rows, *grouped],
            self.device,
        )
        masked = [
            make_group(rows, tables, positions, block_size, self.arch.sliding_window, self.dtype)
            for rows, tables in zip(groups[::2], groups[1::2], strict=True)
        ]
        angles = positions[:, None].float() * self._inv_freq
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = ((f(angles) * self._cos_scale).to(self.dtype) for f in (torch.cos, torch.sin))
        return Step(tokens, cos, sin, blocks, slots, masked, last_rows)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.arch.rms_norm_eps)  # in fp32 inside

    def _attend(
        self, layer: Layer, x: torch.Tensor, index: int, step: Step, arena: KvArena
    ) -> torch.Tensor:
        """Write the KV of normed x [T, hidden] in layer `index`, then compute self-attention."""
        heads, kv_heads, head_dim = self.arch.num_heads, self.arch.num_kv_heads, self.arch.head_dim
        qkv = layer.qkv(x).view(len(x), heads + 2 * kv_heads, head_dim)
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        cache = arena.tensor[:, index]
        cache[:, 0][step.blocks, :, step.slots] = rotate(k, step.cos, step.sin)
        cache[:, 1][step.blocks, :, step.slots] = v
        out = batched_attention(rotate(q, step.cos, step.sin), cache, step.groups)
        return layer.o(out.reshape(len(x), heads * head_dim))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE, halves convention. x [T, heads, head_dim]; cos, sin [T, 1, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
