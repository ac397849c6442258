"""Logprobs of prompts: as of one plain forward pass, however the prompt is computed."""

from dataclasses import replace

import pytest
import torch

from mellmpi.config import BatchConfig, CacheConfig
from mellmpi.engine import KvArena, KvGeometry
from mellmpi.engine.cpu.step import step
from mellmpi.engine.executor import Executor, with_layout
from mellmpi.engine.sampler import SCORED_ROWS, rank
from mellmpi.protocol import GREEDY, SCHEDULER, Assign, Request
from mellmpi.worker import BatchScheduler
from tests.engine.conftest import BLOCK_SIZES, MAKERS, twin
from tests.engine.decoding import random_prompts

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
        built[name] = Executor(model, KvArena(with_layout(geometry, model), 200))
    return built


@pytest.fixture
def executor(executors, model_class):
    return executors[model_class]


class Rank0:
    """Assigns requests to one worker, logs its reports and resumes what it preempts."""

    def __init__(self, executor, num_blocks=200, num_tokens=64, prefix_caching=False):
        limits = BatchConfig(max_num_seqs=min(8, num_tokens), max_num_batched_tokens=num_tokens)
        cache = CacheConfig(enable_prefix_caching=prefix_caching)
        self.executor = executor
        self.batch = BatchScheduler(executor.models, num_blocks, 0, limits, cache)
        self.requests, self.outputs, self.scored = {}, {}, {}
        self.num_preempted = self.num_steps = self.epoch = 0

    def run(self, requests):
        """Compute these requests together. Returns their prompts' logprobs by request id."""
        for request in requests:
            self.requests[request.id], self.outputs[request.id] = request, []
            self.assign(request.id)
        while (plan := self.batch.plan()) is not None:
            self.batch.commit(plan, self.executor.execute(plan))
            self.num_steps += 1
            if (report := self.batch.report(1, 0.1)) is not None:
                self.take(report)
        return {r.id: self.scored.pop(r.id, None) for r in requests}

    def assign(self, request_id):
        self.epoch += 1
        known = tuple(self.outputs[request_id])
        order = Assign(self.requests[request_id], self.epoch, known)
        self.batch.handle(SCHEDULER, order)

    def take(self, report):
        tokens, prompt_logprobs = list(report.tokens), dict(report.prompt_logprobs)
        for run, (request_id, count) in enumerate(
            zip(report.request_ids, report.counts, strict=True)
        ):
            self.outputs[request_id] += [tokens.pop(0) for _ in range(count)]
            if run in prompt_logprobs:
                assert request_id not in self.scored, "logprobs of a prompt reported twice"
                assert report.firsts[run] == 0
                self.scored[request_id] = prompt_logprobs[run]
        for request_id, _ in report.preempted:
            self.num_preempted += 1
            self.assign(request_id)


def scoring(prompts=PROMPTS, sampling=SCORING):
    return [Request(i, "tiny", prompt, sampling, None) for i, prompt in enumerate(prompts)]


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
