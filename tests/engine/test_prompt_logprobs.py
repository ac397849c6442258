"""Logprobs of prompts: as of one plain forward pass, however the prompt is computed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mellmpi.engine import KvArena, KvGeometry
from mellmpi.engine.cpu.step import step
from mellmpi.engine.executor import Executor, with_layout
from mellmpi.engine.sampler import SCORED_ROWS, rank
from mellmpi.protocol import GREEDY, Request
from tests.engine.conftest import BLOCK_SIZES, MAKERS, twin
from tests.engine.decoding import Rank0, random_prompts

NUM_TOP = 3
TOLERANCE = 3e-5  # float32 logprobs of transformers are as far from those in float64
SCORING = replace(GREEDY, max_tokens=6, num_prompt_logprobs=NUM_TOP)
PLAIN = replace(SCORING, num_prompt_logprobs=None)
PROMPTS = [*random_prompts(4, seed=3), tuple(random_prompts(1, seed=5, longest=200)[0]), (7,)]


@pytest.fixture(scope="module")
def executors():
    """An executor of each model class, by name."""
    built = {}
    for name, make in MAKERS.items():
        arch = twin("llama").arch
        model = make(arch, twin("llama").weights(), torch.float32)
        geometry = KvGeometry(
            model="tiny",
            dtype=torch.float32,
            num_layers=arch.num_layers,
            num_kv_heads=arch.num_kv_heads,
            block_size=BLOCK_SIZES[name],
            head_dim=arch.head_dim,
        )
        built[name] = Executor(model, KvArena(with_layout(geometry, model), 200), Path())
    return built


@pytest.fixture
def executor(executors, model_class):
    return executors[model_class]


def scoring(prompts=PROMPTS, sampling=SCORING):
    return [Request(i, "tiny", prompt, sampling, None, 0, None) for i, prompt in enumerate(prompts)]


def assert_right(scored, prompt):
    if len(prompt) == 1:
        assert scored is None
        return
    expected = twin("llama").logits(list(prompt)).double().log_softmax(-1)[:-1]
    assert len(scored) == len(prompt) - 1
    rows = zip(scored, expected, prompt[1:], strict=True)
    for ((logprob, ids, values), place), row, token in rows:
        best = row.topk(NUM_TOP)
        assert logprob == pytest.approx(row[token].item(), abs=TOLERANCE)
        assert list(ids) == best.indices.tolist()
        assert values == pytest.approx(best.values.tolist(), abs=TOLERANCE)
        assert place == 1 + (row > row[token]).sum()


@pytest.mark.parametrize("num_tokens", [5, 64, 1000])
def test_they_are_those_of_one_forward_pass_however_the_prompt_is_divided(executor, num_tokens):
    scored = Rank0(executor, num_tokens=num_tokens).run(scoring())
    assert max(map(len, PROMPTS)) > SCORED_ROWS + 1
    for request_id, prompt in enumerate(PROMPTS):
        assert_right(scored[request_id], prompt)


def test_scoring_changes_no_token(executor):
    plain, asked = Rank0(executor, num_tokens=9), Rank0(executor, num_tokens=9)
    assert not any(plain.run(scoring(sampling=PLAIN)).values())
    asked.run(scoring())
    assert plain.outputs == asked.outputs


def test_a_cached_prefix_hides_no_position(executor):
    rank0 = Rank0(executor, prefix_caching=True)
    [prompt] = random_prompts(1, seed=9, longest=120)
    first = rank0.run(scoring([prompt]))[0]
    before = rank0.batch.pool.num_free
    assert rank0.run(scoring([prompt]))[0] == first
    assert_right(first, prompt)
    assert rank0.batch.pool.num_free == before


def test_preempted_requests_report_them_once(executor):
    """With the first token: what was preempted before is computed again."""
    size = executor.arena.block_size
    prompts = random_prompts(6, seed=1, longest=3 * size)
    sampling = replace(SCORING, max_tokens=2 * size)
    rank0 = Rank0(executor, num_blocks=7, num_tokens=size)
    scored = rank0.run(scoring(prompts, sampling))
    assert rank0.num_preempted
    for request_id, prompt in enumerate(prompts):
        assert_right(scored[request_id], prompt)
    assert all(len(outputs) == 2 * size for outputs in rank0.outputs.values())


def test_on_cpus_they_are_the_same_bits_however_the_prompt_is_divided(executors):
    whole = Rank0(executors["cpu"], num_tokens=1000).run(scoring())
    assert Rank0(executors["cpu"], num_tokens=3).run(scoring()) == whole


def test_no_kernel_is_compiled_for_them(executors):
    Rank0(executors["cpu"]).run(scoring(sampling=PLAIN))
    signatures = list(step.signatures)
    Rank0(executors["cpu"]).run(scoring())
    assert list(step.signatures) == signatures


def test_equal_logits_rank_by_id():
    logits = torch.tensor([0.0, 2.0, 2.0, 5.0]).numpy()
    assert [rank(logits, token) for token in range(4)] == [4, 2, 3, 1]
