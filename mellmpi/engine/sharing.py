"""Several models on one device: each has its own weights, all share one KV arena."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mellmpi.config import CacheConfig, ModelConfig
from mellmpi.engine.device import choose_device
from mellmpi.engine.executor import Executor, geometry_of, load_model, num_blocks, with_layout
from mellmpi.engine.kv_arena import KvArena, with_equal_blocks
from mellmpi.models import Architecture
from mellmpi.protocol import HostedModel, StepPlan, StepResult


class SharedEngine:
    """One executor for each model, all over the same blocks. A step runs one model."""

    def __init__(self, executors: Sequence[Executor]):
        self._executors = {executor.model_kv.model: executor for executor in executors}
        self.arena = executors[0].arena  # for transfers of blocks: the same memory for all

    @property
    def arithmetic(self) -> str:
        """See `Executor.arithmetic`."""
        return next(iter(self._executors.values())).arithmetic

    @property
    def warm_up_s(self) -> float:
        """See `Executor.warm_up_s`."""
        return sum(executor.warm_up_s for executor in self._executors.values())

    @property
    def models(self) -> tuple[HostedModel, ...]:
        """The hosted models, in the order of the executors."""
        return tuple(hosted for executor in self._executors.values() for hosted in executor.models)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run the plan's model: see `Executor.execute`."""
        return self._executors[plan.model].execute(plan)

    def release(self) -> None:
        """Free weights and arena; this engine can run no more plans."""
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
    """Load the hosted models and allocate their common arena.

    directories  one for each of `models`
    hosted       names of the models to load. All models determine the bytes of a block: workers
                 that host different models exchange blocks
    device       the value of `--device`
    num_threads  compute threads on a CPU; None: torch's present setting
    ValueError   names the option to change if the KV arena would hold no block
    """
    on = choose_device(device)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    pairs = list(zip(directories, models, strict=True))
    plain = [geometry_of(Architecture.from_directory(d), m, cache) for d, m in pairs]
    chosen = [
        (pair, geometry)
        for pair, geometry in zip(pairs, with_equal_blocks(plain), strict=True)
        if geometry.model in hosted
    ]
    loaded = [load_model(directory, model, cache, on) for (directory, model), _ in chosen]
    geometries = [with_layout(g, model) for (_, g), model in zip(chosen, loaded, strict=True)]
    arena = KvArena(geometries[0], num_blocks(geometries[0], cache, on), on)
    return SharedEngine(
        [
            Executor(model, arena.view_as(geometry), directory)
            for model, geometry, ((directory, _), _) in zip(loaded, geometries, chosen, strict=True)
        ]
    )
