"""Several models share one arena: each gives the same answers as alone."""

from dataclasses import replace

import pytest
import torch

from mellmpi.config import BatchConfig, CacheConfig, ModelConfig
from mellmpi.engine import build_engine
from mellmpi.models import checkpoint
from mellmpi.protocol import GREEDY, SCHEDULER, Assign, Request
from mellmpi.worker import BatchScheduler

NAMES = ("tiny-llama", "tiny-qwen3")  # the heads of the second are twice as wide
CACHE = CacheConfig(kv_cache_memory_bytes=1 << 20)
LENGTHS = [(5, 40), (33, 30), (70, 20), (1, 60)]  # (prompt, output)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    cache_dir = tmp_path_factory.mktemp("models")
    return [checkpoint.resolve(f"random:{name}", cache_dir) for name in NAMES]


@pytest.fixture(params=["float32", "bfloat16"])
def engine(directories, request):
    """(hosted names) -> an engine; both models are in the job."""
    models = [ModelConfig(model=name, dtype=request.param) for name in NAMES]

    def build(*hosted):
        return build_engine(directories, models, CACHE, hosted=hosted, num_threads=1)

    return build


def requests(model, first_id):
    generator = torch.Generator().manual_seed(7)
    for i, (num_prompt, num_outputs) in enumerate(LENGTHS):
        prompt = torch.randint(3, 500, (num_prompt,), generator=generator).tolist()
        sampling = replace(GREEDY, max_tokens=num_outputs)
        yield Request(first_id + i, model, tuple(prompt), sampling, None, 0, None)


def answers(engine, submitted):
    """The outputs of these requests, computed together; by id."""
    limits = BatchConfig(max_num_seqs=8, max_num_batched_tokens=64)
    batch = BatchScheduler(engine.models, engine.arena.num_blocks, 0, limits, CACHE)
    sequences = {}
    for request in submitted:
        batch.handle(SCHEDULER, Assign(request, request.id, ()))
        sequences[request.id] = batch.sequences[request.id]
    while (plan := batch.plan()) is not None:
        batch.commit(plan, engine.execute(plan))
    assert batch.pool.num_free == batch.pool.num_blocks
    return {i: sequence.outputs for i, sequence in sequences.items()}


def test_models_answer_as_alone_even_in_blocks_that_the_other_has_used(engine):
    alone = {}
    for i, name in enumerate(NAMES):
        alone |= answers(engine(name), list(requests(name, 10 * i + 1)))
    together = engine(*NAMES)
    submitted = [r for i, name in enumerate(NAMES) for r in requests(name, 10 * i + 1)]
    assert answers(together, submitted) == alone
    assert answers(together, submitted[::-1]) == alone


def test_blocks_have_the_same_bytes_and_layout_whatever_a_worker_hosts(engine):
    both = {m.kv.model: m for m in engine(*NAMES).models}
    for name in NAMES:
        [alone] = engine(name).models
        assert alone == both[name]
    small, large = (both[name].kv for name in NAMES)
    assert (small.block_size, large.block_size) == (32, 16)
    assert small.block_bytes == large.block_bytes


def test_a_released_engine_holds_neither_weights_nor_arena(engine):
    released = engine(*NAMES)
    released.release()
    assert not released.models and not hasattr(released, "arena")
