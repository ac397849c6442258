"""The executor: runs step plans of one model on one device."""

import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mellmpi.config import CacheConfig, ModelConfig
from mellmpi.engine import weights
from mellmpi.engine.cpu import CpuModel, unsupported
from mellmpi.engine.cuda import TorchModel
from mellmpi.engine.device import choose_device, kv_budget_bytes, synchronize
from mellmpi.engine.grammar import Grammars
from mellmpi.engine.kv_arena import KvArena, KvGeometry
from mellmpi.engine.packing import PackedBatch, pack
from mellmpi.engine.sampler import sample, score
from mellmpi.models import Architecture
from mellmpi.protocol import HostedModel, ModelKv, StepPlan, StepResult

log = logging.getLogger(__name__)


class Model(Protocol):
    """The interface of a model class: weights on one device and their forward pass."""

    arch: Architecture

    @property
    def arithmetic(self) -> str: ...
    @property
    def warm_up_s(self) -> float: ...

    def forward(self, batch: PackedBatch, arena: KvArena) -> torch.Tensor:
        """Logits of the sampled rows, float32 [num_sampled, vocab]; writes K and V of all rows."""
        ...

    def logits_of(self, rows: np.ndarray) -> torch.Tensor:
        """Logits of rows int32 [n] of the last batch, which `is_scored`: float32 [n, vocab]."""
        ...


class Executor:
    """One model and its KV arena, ready to run. `release` frees both; to wake, build another."""

    def __init__(self, model: Model, arena: KvArena, directory: Path):
        """`directory`: the model's, whose tokenizer.json grammars need."""
        self.model, self.arena = model, arena
        self.arch = model.arch
        file, vocab_size = directory / "tokenizer.json", model.arch.vocab_size
        self._grammars = Grammars(file, vocab_size, torch.get_num_threads())

    @property
    def model_kv(self) -> ModelKv:
        return self.arena.geometry.model_kv

    @property
    def fingerprint(self) -> str:
        """The digest of the KV layout: equal ones can exchange blocks."""
        return self.arena.fingerprint

    @property
    def arithmetic(self) -> str:
        """Executors with equal `arithmetic` give the same answers, bit for bit."""
        return self.model.arithmetic

    @property
    def warm_up_s(self) -> float:
        """Seconds of compiling within the construction: a second one takes less by them."""
        return self.model.warm_up_s

    @property
    def models(self) -> tuple[HostedModel, ...]:
        """The hosted model, in a tuple of one."""
        return (HostedModel(self.model_kv, self.fingerprint),)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one forward pass. Returns the next token of each sampled chunk, in plan order.

        When it returns, all KV is written: other streams may send, receive into and reuse blocks.
        Copying tokens to the host waits for the step; a step without tokens is waited for.
        """
        self.arena.copy_blocks(plan.copies)
        if not plan.chunks:
            synchronize(self.arena.device)
            return StepResult((), ())
        batch = pack(plan, self.arena.block_size)
        logits = self.model.forward(batch, self.arena)
        if not batch.num_sampled:
            synchronize(self.arena.device)
        sampled = plan.chunks[: batch.num_sampled]
        masks = self._grammars.masks(sampled)  # on a GPU, beside the forward pass
        result = sample(logits, sampled, masks)
        if not batch.is_scored:
            return result
        rows = zip(plan.chunks, batch.cu_chunks.tolist(), strict=False)
        scored = tuple(
            score(self.model.logits_of, chunk.scoring, row)
            for chunk, row in rows
            if chunk.scoring is not None
        )
        return replace(result, prompt_logprobs=scored)

    def release(self) -> None:
        """Free weights and arena; this executor can run no more plans."""
        device = self.arena.device
        del self.model, self.arena
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def build_executor(
    directory: Path,
    model_config: ModelConfig,
    cache_config: CacheConfig,
    *,
    device: str = "auto",
    num_threads: int | None = None,
    plain_torch: bool = False,
) -> Executor:
    """Load the model in `directory` and allocate its arena.

    device       the value of `--device`
    num_threads  compute threads on a CPU; None: torch's present setting
    plain_torch  use TorchModel on a CPU, too
    ValueError   names the option to change if the KV arena would hold no block
    """
    on = choose_device(device)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    model = load_model(directory, model_config, cache_config, on, plain_torch)
    geometry = with_layout(geometry_of(model.arch, model_config, cache_config), model)
    arena = KvArena(geometry, num_blocks(geometry, cache_config, on), on)
    return Executor(model, arena, directory)


def load_model(
    directory: Path,
    model_config: ModelConfig,
    cache_config: CacheConfig,
    on: torch.device,
    plain_torch: bool = False,
) -> Model:
    """Load the model in `directory` on a device; the arguments are those of `build_executor`."""
    dtype = getattr(torch, model_config.dtype)
    arch, tensors = weights.load(directory, dtype, on, model_config.seed)
    if plain_torch or not _kernels_fit(arch, dtype, cache_config.block_size, on):
        return TorchModel(arch, tensors, dtype, on)
    model = CpuModel(arch, tensors, dtype, torch.get_num_threads())
    model.warm_up()
    return model


def geometry_of(
    arch: Architecture, model_config: ModelConfig, cache_config: CacheConfig
) -> KvGeometry:
    """The KV geometry of a model, with the plain layout inside a block."""
    return KvGeometry(
        model=model_config.name,
        dtype=getattr(torch, model_config.dtype),
        num_layers=arch.num_layers,
        num_kv_heads=arch.num_kv_heads,
        block_size=cache_config.block_size,
        head_dim=arch.head_dim,
    )


def with_layout(geometry: KvGeometry, model: Model) -> KvGeometry:
    """The geometry with the layout that this model reads and writes."""
    return replace(geometry, layout="kernels" if isinstance(model, CpuModel) else "plain")


def _kernels_fit(
    arch: Architecture, dtype: torch.dtype, block_size: int, device: torch.device
) -> bool:
    if device.type != "cpu":
        return False
    if reason := unsupported(arch, dtype, block_size):
        log.warning("%s; using plain torch, which is several times slower", reason)
    return reason is None


def num_blocks(geometry: KvGeometry, cache: CacheConfig, device: torch.device) -> int:
    """The number of blocks that the memory for KV holds; ValueError if it holds none."""
    budget = kv_budget_bytes(cache, device)
    if budget < geometry.block_bytes:
        raise ValueError(
            f"{max(0, budget)} bytes for KV do not hold one block of {geometry.block_bytes}: "
            "raise --kv-cache-memory-bytes"
            + (" or --gpu-memory-utilization" if device.type == "cuda" else "")
        )
    return budget // geometry.block_bytes
