"""Several models on one device: each has its weights, all have one KV arena."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mellmpi.config import CacheConfig, ModelConfig
from mellmpi.engine.device import choose_device
from mellmpi.engine.executor import Executor, as_laid_out, geometry_of, load_model, num_blocks
from mellmpi.engine.kv_arena import KvArena, shared
from mellmpi.models import Architecture
from mellmpi.protocol import HostedModel, StepPlan, StepResult


class SharedEngine:
    """An executor for each model, over the same blocks. A step is of one model."""

    def __init__(self, executors: Sequence[Executor]):
        self._executors = {executor.model_kv.model: executor for executor in executors}
        self.arena = executors[0].arena  # for whoever moves blocks: the same memory for all

    @property
    def arithmetic(self) -> str:
        """How it computes: see `Executor.arithmetic`."""
        return next(iter(self._executors.values())).arithmetic

    @property
    def models(self) -> tuple[HostedModel, ...]:
        """As the worker sees them, in the order in which they were given."""
        return tuple(hosted for executor in self._executors.values() for hosted in executor.models)

    def execute(self, plan: StepPlan) -> StepResult:
        """One forward pass of the plan's model; the next token of each sampled chunk."""
        return self._executors[plan.model].execute(plan)

    def release(self) -> None:
        """Give weights and arena back to the device; this engine runs no more plans."""
        del self.arena
        while self._executors:
            self._executors.popitem()[1].release()


def build_engine(
    directories: Sequence[Path],
    models: Sequence[ModelConfig],
    cache: CacheConfig,
    *,
    hosted: Sequence[str],
    device: str = "auto",
    num_threads: int | None = None,
) -> SharedEngine:
    """Load the hosted ones of these models and allocate their arena; also the way to wake up.

    directories of the models, one each
    hosted      names of those to load. The others count, too: blocks travel between workers that
                host different ones, and need the same bytes everywhere
    device      as `--device` has it
    num_threads compute threads on a CPU; None: as torch is set already
    ValueError  says which option to change when the KV arena would hold no block
    """
    on = choose_device(device)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    pairs = list(zip(directories, models, strict=True))
    everywhere = shared([geometry_of(Architecture.from_directory(d), m, cache) for d, m in pairs])
    mine = [
        (pair, geometry)
        for pair, geometry in zip(pairs, everywhere, strict=True)
        if geometry.model in hosted
    ]
    loaded = [load_model(directory, model, cache, on) for (directory, model), _ in mine]
    geometries = [as_laid_out(g, model) for (_, g), model in zip(mine, loaded, strict=True)]
    arena = KvArena(geometries[0], num_blocks(geometries[0], cache, on), on)
    return SharedEngine(
        [
            Executor(model, arena.seen_as(geometry))
            for model, geometry in zip(loaded, geometries, strict=True)
        ]
    )
