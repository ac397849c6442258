"""From a directory of weights to tokens: the whole engine with tiny models."""

from dataclasses import replace

import psutil
import pytest
import torch

from mellmpi.config import CacheConfig, ModelConfig
from mellmpi.engine import build_executor
from mellmpi.engine.cpu import CpuModel
from mellmpi.engine.cuda import TorchModel
from mellmpi.protocol import Chunk, ModelKv, StepPlan
from tests.engine.decoding import ChunkScheduler, LiveRequest, mixed_requests, random_prompts

FLOAT32 = ModelConfig(model="tiny", dtype="float32")
CACHE = CacheConfig(kv_cache_memory_bytes=4 << 20)


@pytest.fixture
def tiny_directory(get_twin, tmp_path):
    """(variant) -> a checkpoint directory as transformers writes it."""

    def save(variant="llama"):
        get_twin(variant).reference.save_pretrained(tmp_path / variant)
        return tmp_path / variant

    return save


@pytest.fixture
def build(tiny_directory, model_class):
    """(variant) -> Executor in float32, once with each model class."""

    def build(variant="llama", **options):
        directory, plain = tiny_directory(variant), model_class == "torch"
        return build_executor(directory, FLOAT32, CACHE, plain_torch=plain, **options)

    return build


@pytest.fixture
def executor(build):
    return build()


@pytest.mark.parametrize("variant", ["llama", "llama3-rope", "mistral-window", "qwen2", "qwen3"])
def test_a_saved_model_of_any_family_generates_what_transformers_does(
    variant, build, get_twin, greedy
):
    scheduler = ChunkScheduler(build(variant), limit=7)
    lives = [LiveRequest(prompt, greedy) for prompt in random_prompts(5)]
    outputs = scheduler.run(lives, 12)
    for live, output in zip(lives, outputs, strict=True):
        prompt = torch.tensor([live.prompt])
        reference = get_twin(variant).reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
        assert reference[0, len(live.prompt) :].tolist() == output


def test_answers_do_not_depend_on_batch_chunks_or_blocks(executor, greedy):
    together = ChunkScheduler(executor).run(mixed_requests(greedy), 10)
    alone = [ChunkScheduler(executor, seed=1).run([live], 10)[0] for live in mixed_requests(greedy)]
    in_pieces = ChunkScheduler(executor, limit=5, seed=2).run(mixed_requests(greedy), 10)
    assert together == alone == in_pieces


def test_a_request_resumed_from_its_tokens_has_the_same_answer(executor, greedy):
    expected = ChunkScheduler(executor).run(mixed_requests(greedy), 12)
    halfway = mixed_requests(greedy)
    ChunkScheduler(executor).run(halfway, 5)
    resumed = [LiveRequest(live.prompt, live.sampling, list(live.outputs)) for live in halfway]
    assert ChunkScheduler(executor, limit=9, seed=3).run(resumed, 12) == expected


def test_a_request_whose_blocks_were_transferred_has_the_same_answer(executor, build, greedy):
    expected = ChunkScheduler(executor).run(mixed_requests(greedy), 12)
    source, target = ChunkScheduler(executor), ChunkScheduler(build(), seed=4)
    lives = mixed_requests(greedy)
    source.run(lives, 5)
    for live in lives:
        target.receive(live, source)
    executor.arena.tensor.fill_(9.0)  # the source keeps no KV
    assert target.run(lives, 12) == expected


def test_a_step_returns_logprobs(executor, get_twin, greedy):
    live = LiveRequest(tuple(range(20)), replace(greedy, num_logprobs=2))
    ChunkScheduler(executor).run([live], 1)
    expected = get_twin("llama").logits(list(live.prompt))[-1].log_softmax(-1)
    chosen, ids, values = live.logprobs[0]
    assert ids[0] == live.outputs[0] and chosen == values[0]
    assert values == pytest.approx(expected.topk(2).values.tolist(), abs=1e-4)


def test_copies_are_done_before_the_forward_pass(executor, greedy):
    """Copy-on-write: a shared block is copied before its owner writes into it."""
    tokens = tuple(range(10, 37))
    plain = Chunk(1, 0, tokens, [0, 1], greedy, (tokens, []))
    expected = executor.execute(StepPlan("m", (plain,), ())).tokens
    executor.arena.tensor[2] = 7.0
    tail = Chunk(2, 26, tokens[26:], [0, 2], greedy, (tokens, []))
    assert executor.execute(StepPlan("m", (tail,), ((1, 2),))).tokens == expected


def test_a_plan_of_copies_only_samples_nothing(executor):
    executor.arena.tensor[3] = 2.0
    result = executor.execute(StepPlan("m", (), ((3, 5),)))
    assert result.tokens == () and (executor.arena.tensor[5] == 2.0).all()


# --- memory and life cycle -----------------------------------------------------------------------


def test_a_step_without_tokens_ends_when_its_kv_is_written(executor, greedy, monkeypatch):
    waited = []
    monkeypatch.setattr("mellmpi.engine.executor.synchronize", waited.append)
    execute = executor.execute
    last = Chunk(1, 2, (5, 9), [3], greedy, ((3, 1, 5, 9), []))
    execute(StepPlan("m", (last,), ()))
    assert waited == []  # copying its token to the host has waited
    execute(StepPlan("m", (replace(last, sampling=None),), ()))
    execute(StepPlan("m", (), ((3, 7),)))
    assert waited == [executor.arena.device] * 2


def test_the_arena_takes_the_configured_memory(executor):
    assert executor.model_kv == ModelKv("tiny", 16, 3 * 2 * 2 * 16 * 16 * 4)
    assert executor.arena.num_blocks == (4 << 20) // executor.model_kv.block_bytes


def test_the_default_budget_of_a_cpu_is_one_gibibyte(tiny_directory):
    executor = build_executor(tiny_directory(), ModelConfig(), CacheConfig())
    assert 0 <= (1 << 30) - executor.arena.num_bytes < executor.arena.block_bytes


def test_an_arena_of_less_than_a_block_is_refused_with_the_option_to_change(tiny_directory):
    with pytest.raises(ValueError, match="--kv-cache-memory-bytes"):
        build_executor(tiny_directory(), ModelConfig(), CacheConfig(kv_cache_memory_bytes=100))


def test_fingerprints_differ_by_model_dtype_and_layout(tiny_directory):
    directory = tiny_directory()
    configs = [FLOAT32, replace(FLOAT32, model="other"), replace(FLOAT32, dtype="bfloat16")]
    executors = [build_executor(directory, config, CACHE) for config in configs]
    executors.append(build_executor(directory, FLOAT32, CACHE, plain_torch=True))
    assert len({executor.fingerprint for executor in executors}) == 4
    assert build_executor(directory, FLOAT32, CACHE).fingerprint == executors[0].fingerprint


def test_release_frees_memory_and_building_again_gives_the_same_answers(tiny_directory, greedy):
    cache, prompts = CacheConfig(kv_cache_memory_bytes=300 << 20), random_prompts(3)
    executor = build_executor(tiny_directory(), FLOAT32, cache)
    before = ChunkScheduler(executor).run([LiveRequest(prompt, greedy) for prompt in prompts], 4)
    executor.arena.tensor.fill_(1.0)
    used = psutil.Process().memory_info().rss
    executor.release()
    assert used - psutil.Process().memory_info().rss > 250 << 20
    awake = build_executor(tiny_directory(), FLOAT32, cache)
    assert (
        ChunkScheduler(awake).run([LiveRequest(prompt, greedy) for prompt in prompts], 4) == before
    )


def test_a_cpu_runs_the_kernels_unless_plain_torch_is_requested(tiny_directory):
    directory = tiny_directory()
    assert isinstance(build_executor(directory, FLOAT32, CACHE).model, CpuModel)
    plain = build_executor(directory, FLOAT32, CACHE, plain_torch=True)
    assert isinstance(plain.model, TorchModel)


def test_an_unsupported_shape_runs_in_plain_torch_with_a_warning(tiny_directory, caplog):
    odd = replace(CACHE, block_size=5)
    executor = build_executor(tiny_directory(), FLOAT32, odd)
    assert isinstance(executor.model, TorchModel) and "block-size" in caplog.text


def test_a_cuda_device_that_is_not_there_is_refused(tiny_directory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cpu"):
        build_executor(tiny_directory(), ModelConfig(), CACHE, device="cuda")
