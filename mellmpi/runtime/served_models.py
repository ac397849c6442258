"""What the models of a job can take, once its workers have started."""

from collections.abc import Sequence
from pathlib import Path

from mellmpi.config import Config, ModelConfig
from mellmpi.frontend import ServedModel
from mellmpi.models import Architecture
from mellmpi.runtime.ending import JobFailed
from mellmpi.scheduler import WorkerRegistry


def served_models(
    config: Config, directories: Sequence[Path], registry: WorkerRegistry
) -> tuple[ServedModel, ...]:
    """Return the models with their limits: the smaller of model limit and worker's KV cache.

    Raises JobFailed if no worker could start one of them.
    """
    if not registry.models:
        raise JobFailed("no worker could start")
    return tuple(
        _served(registry, model, directory)
        for model, directory in zip(config.models, directories, strict=True)
    )


def _served(registry: WorkerRegistry, model: ModelConfig, directory: Path) -> ServedModel:
    arch, ledger = Architecture.from_directory(directory), registry.ledger
    if (kv := registry.models.get(model.name)) is None:
        raise JobFailed(f"no worker could start {model.name}")
    largest = int(ledger.capacity[ledger.able(model.name)].max())
    room = largest // kv.block_bytes * kv.block_size
    limit = model.max_model_len or arch.max_position
    return ServedModel(
        name=model.name,
        max_model_len=min(limit, room),
        vocab_size=arch.vocab_size,
        eos_ids=arch.eos_ids,
    )


def mixed_arithmetic(by_worker: dict[int, str]) -> str:
    """Return a warning if workers compute in different ways, else ""."""
    kinds = dict.fromkeys(by_worker.values())
    if len(kinds) < 2:
        return ""
    workers = {k: [str(w) for w, one in by_worker.items() if one == k] for k in kinds}
    ways = "; ".join(f"{kind}: worker {', '.join(workers[kind])}" for kind in kinds)
    return (
        f"workers compute in different ways ({ways}): the answer to a request may depend on "
        "the worker that computes it"
    )
