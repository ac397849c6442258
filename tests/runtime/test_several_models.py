"""Several models in one cell: migrations do not change the model or the answer of a request."""

from functools import partial

import pytest

from mellmpi.config import CacheConfig, ModelConfig
from mellmpi.engine import build_engine
from mellmpi.models import checkpoint
from mellmpi.protocol import ModelKv
from mellmpi.sim.executor import expected_outputs
from tests.runtime.cell import Cell, HashEngine, ListFront, request

A, B = ModelKv("a", 8, 64), ModelKv("b", 3, 64)
TINY = ("tiny-llama", "tiny-qwen3")
CACHE = CacheConfig(kv_cache_memory_bytes=2 << 20)


def asked(models, num=24, longest=60):
    return [
        request(i, num_prompt=3 + 5 * (i % 7), max_tokens=10 + (7 * i) % longest, model=model)
        for i, model in enumerate(models * (num // len(models)))
    ]


class Spied(HashEngine):
    """Checks that steps are of hosted models only."""

    def execute(self, plan):
        assert plan.model in {hosted.kv.model for hosted in self.models}
        return super().execute(plan)


@pytest.mark.parametrize("policy", ["best_fit", "worst_fit", "frugal"])
@pytest.mark.parametrize("migrate", ["never", "auto", "stress"])
def test_every_request_is_answered_by_its_model_on_workers_with_different_models(policy, migrate):
    sets = [(A,), (B,), (B, A), (A, B)]
    cell = Cell([partial(Spied, 60, models) for models in sets], policy=policy, migrate=migrate)
    requests = asked(["a", "b", "b"], num=36)
    front = ListFront(requests)
    cell.run(front)
    assert front.outputs == {r.id: expected_outputs(r) for r in requests}
    moved = cell.metrics.report(1.0)["migrations"]
    assert migrate != "stress" or (moved["transfer"] > 5 and moved["recompute"] > 0)


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """(names of hosted models) -> function that builds an engine."""
    cache_dir = tmp_path_factory.mktemp("models")
    directories = [checkpoint.resolve(f"random:{name}", cache_dir) for name in TINY]
    models = [ModelConfig(model=name, dtype="float32") for name in TINY]
    return lambda *hosted: partial(
        build_engine, directories, models, CACHE, hosted=hosted, num_threads=1
    )


def answers(builds, requests, **cluster):
    cell, front = Cell(builds, **cluster), ListFront(requests)
    cell.run(front)
    return front.outputs, cell.metrics.report(1.0)["migrations"]


def test_two_real_models_give_their_answers_with_and_without_migrations(builds):
    requests = asked(list(TINY))
    alone = {}
    for name in TINY:
        mine = [r for r in requests if r.model == name]
        alone |= answers([builds(name)], mine, migrate="never")[0]
    assert len(alone) == len(requests) and all(alone.values())
    together, _ = answers([builds(*TINY)], requests, migrate="never")
    assert together == alone
    sets = [builds(*TINY), builds(TINY[0]), builds(TINY[1]), builds(*TINY)]
    moving, moved = answers(sets, requests, migrate="stress", policy="worst_fit")
    assert moving == alone and moved["transfer"] > 5
