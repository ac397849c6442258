"""Several models on one worker: one pool of blocks, and alternating steps."""

import pytest

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.protocol import (
    SCHEDULER,
    Assign,
    DrainBlocks,
    HostedModel,
    KvFailed,
    KvPayload,
    ModelKv,
    ReceiveKv,
    Request,
    SendKv,
    StepResult,
)
from mellmpi.worker import BatchScheduler
from tests.scheduler.stage import request

BLOCK_BYTES = 64
SMALL, LARGE = ModelKv("small", 8, BLOCK_BYTES), ModelKv("large", 2, BLOCK_BYTES)
HOSTED = tuple(HostedModel(kv, f"layout of {kv.model}") for kv in (SMALL, LARGE))


def of(model: str, request_id: int, **kwargs) -> Request:
    asked = request(request_id, **kwargs)
    return Request(request_id, model, asked.prompt, asked.sampling, None, 0, None)


class Bench:
    def __init__(self, num_blocks=8, prefix=False, models=HOSTED):
        cache = CacheConfig(enable_prefix_caching=prefix)
        self.batch = BatchScheduler(models, num_blocks, 0, BatchConfig(), cache)

    def assign(self, model, request_id, **kwargs):
        order = Assign(of(model, request_id, **kwargs), request_id, ())
        self.batch.handle(SCHEDULER, order)
        return self.batch.sequences.get(request_id)

    def step(self):
        """(model, ids of its requests) of one step."""
        plan = self.batch.plan()
        if plan is None:
            return None
        n = sum(chunk.sampling is not None for chunk in plan.chunks)
        self.batch.commit(plan, StepResult((9,) * n, (None,) * n))
        return plan.model, [chunk.request_id for chunk in plan.chunks]


@pytest.fixture
def bench():
    return Bench()


def test_a_step_computes_one_model_and_models_alternate(bench):
    bench.assign("small", 1)
    bench.assign("large", 2)
    bench.assign("small", 3)
    steps = [bench.step() for _ in range(4)]
    assert steps == [("small", [1, 3]), ("large", [2])] * 2


def test_a_model_without_work_is_skipped(bench):
    bench.assign("large", 2)
    assert [bench.step() for _ in range(2)] == [("large", [2])] * 2
    bench.assign("small", 1)
    assert bench.step() == ("small", [1])


def test_a_model_with_all_sequences_preempted_leaves_the_step_to_the_other():
    bench = Bench(num_blocks=2)
    bench.assign("small", 1, num_prompt=8)
    bench.assign("large", 2, num_prompt=2)
    bench.step(), bench.step()
    # Now both need a second block: that of `large`, the younger, is preempted.
    assert [bench.step() for _ in range(2)] == [("small", [1])] * 2
    assert list(bench.batch.sequences) == [1]
    assert bench.batch.report(1, 0.1).preempted == ((2, 2),)


def test_the_youngest_sequence_of_any_model_is_preempted_for_an_older_one():
    bench = Bench(num_blocks=3)
    bench.assign("large", 1, num_prompt=4)
    bench.assign("small", 2, num_prompt=1)
    assert [bench.step()[0] for _ in range(3)] == ["small", "large", "small"]
    assert bench.step() == ("large", [1]) and list(bench.batch.sequences) == [1]


def test_the_number_of_blocks_depends_on_the_model(bench):
    assert len(bench.assign("small", 1, num_prompt=6).block_table) == 1
    assert len(bench.assign("large", 2, num_prompt=6).block_table) == 3
    assert bench.batch.free_bytes == 4 * BLOCK_BYTES


def test_blocks_freed_by_one_model_are_used_by_another():
    bench = Bench(num_blocks=2)
    table = bench.assign("small", 1, num_prompt=9, max_tokens=1).block_table
    bench.step()
    assert set(bench.assign("large", 2, num_prompt=3).block_table) == set(table)


def test_equal_prefixes_are_shared_within_a_model_and_never_across_models():
    bench = Bench(
        num_blocks=12,
        prefix=True,
        models=(HOSTED[0], HostedModel(ModelKv("twin", 8, BLOCK_BYTES), "layout of twin")),
    )
    first = bench.assign("small", 1, num_prompt=20)
    bench.step()
    assert bench.assign("twin", 2, num_prompt=20).num_computed == 0
    again = bench.assign("small", 3, num_prompt=20)
    assert again.num_computed == 16 and again.block_table[:2] == first.block_table[:2]


def test_a_header_has_the_layout_of_the_model(bench):
    bench.assign("large", 1)
    [(_, header)] = bench.batch.handle(SCHEDULER, SendKv(1, 1, 2, 9, 0))
    assert header.fingerprint == "layout of large"


def test_the_kv_of_another_model_of_this_worker_is_not_accepted(bench):
    bench.batch.handle(SCHEDULER, ReceiveKv(of("large", 7), 2, 2, 0, 3, 0, ()))
    header = KvPayload(7, 2, "layout of small", 0, 1, 3, (), (), (), True)
    [(_, drain), (_, failed)] = bench.batch.handle(2, header)
    assert isinstance(drain, DrainBlocks) and isinstance(failed, KvFailed)
    assert "layout of small is not ours (layout of large)" in failed.reason


@pytest.mark.parametrize(
    "order",
    [
        Assign(of("absent", 1), 1, ()),
        ReceiveKv(of("absent", 1), 1, 2, 0, 3, 0, ()),
    ],
)
def test_a_request_for_a_model_that_is_not_here_is_a_bug(bench, order):
    with pytest.raises(AssertionError, match="absent is not here"):
        bench.batch.handle(SCHEDULER, order)


def test_blocks_of_different_bytes_are_a_bug():
    other = HostedModel(ModelKv("other", 8, 2 * BLOCK_BYTES), "layout of other")
    with pytest.raises(ValueError):
        Bench(models=(HOSTED[0], other))
