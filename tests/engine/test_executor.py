"""From a directory of weights to tokens: the whole engine, tiny models and a real one."""

from dataclasses import dataclass, field, replace

import numpy as np
import psutil
import pytest
import torch
import transformers

from mellmpi.config import CacheConfig, ModelConfig
from mellmpi.engine import build_executor
from mellmpi.engine.cpu import CpuModel
from mellmpi.engine.cuda import TorchModel
from mellmpi.models import checkpoint
from mellmpi.protocol import Chunk, ModelKv, Sampling, StepPlan

FLOAT32 = ModelConfig(model="tiny", dtype="float32")
CACHE = CacheConfig(kv_cache_memory_bytes=4 << 20)


@dataclass
class Live:
    """A request being answered: its tokens, where its KV is, and how far it is computed."""

    prompt: tuple[int, ...]
    sampling: Sampling
    outputs: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    num_computed: int = 0

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.outputs]


class Loop:
    """A batch scheduler in miniature: chunks of at most `limit` tokens, blocks in a random order"""

    def __init__(self, executor, limit=1000, seed=0):
        self.executor, self.limit = executor, limit
        generator = torch.Generator().manual_seed(seed)
        self.free = torch.randperm(executor.arena.num_blocks, generator=generator).tolist()

    def _chunk(self, live: Live) -> Chunk:
        tokens, start = live.tokens, live.num_computed
        end = min(len(tokens), start + self.limit)
        live.table += [self.free.pop() for _ in range(self._blocks(end) - len(live.table))]
        sampling = live.sampling if end == len(tokens) else None
        history = (live.prompt, live.outputs)
        return Chunk(id(live), start, tuple(tokens[start:end]), live.table, sampling, history)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.executor.arena.block_size)

    def step(self, lives: list[Live]) -> None:
        pairs = [(live, self._chunk(live)) for live in lives]
        pairs.sort(key=lambda pair: pair[1].sampling is None)
        result = self.executor.execute(StepPlan("m", tuple(chunk for _, chunk in pairs), ()))
        for live, chunk in pairs:
            live.num_computed += len(chunk.tokens)
        for (live, _), token, logprob in zip(pairs, result.tokens, result.logprobs, strict=False):
            live.outputs.append(token)
            live.logprobs.append(logprob)

    def run(self, lives: list[Live], until: int) -> list[list[int]]:
        while any(active := [live for live in lives if len(live.outputs) < until]):
            self.step(active)
        return [live.outputs for live in lives]

    def receive(self, live: Live, source: "Loop") -> None:
        """What a migration by transfer does: raw bytes of the blocks, under other ids."""
        assert self.executor.fingerprint == source.executor.fingerprint
        theirs, live.table = live.table, [self.free.pop() for _ in live.table]
        for old, new in zip(theirs, live.table, strict=True):
            self.executor.arena.block(new).copy_(source.executor.arena.block(old))
        source.free += theirs


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


def random_prompts(num, seed=0, longest=40, vocab=131):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, num)
    return [tuple(rng.integers(0, vocab, n).tolist()) for n in lengths]


def mixed_requests(greedy, num=12):
    kinds = [
        {},
        dict(temperature=0.8),
        dict(temperature=1.2, top_p=0.9, top_k=30),
        dict(temperature=1.0, repetition_penalty=1.4, min_p=0.02),
        dict(frequency_penalty=0.6),
    ]
    return [
        Live(prompt, replace(greedy, seed=i, **kinds[i % len(kinds)]))
        for i, prompt in enumerate(random_prompts(num))
    ]


@pytest.mark.parametrize("variant", ["llama", "llama3-rope", "mistral-window", "qwen2", "qwen3"])
def test_a_saved_model_of_any_family_generates_what_transformers_does(
    variant, build, get_twin, greedy
):
    loop = Loop(build(variant), limit=7)
    lives = [Live(prompt, greedy) for prompt in random_prompts(5)]
    outputs = loop.run(lives, 12)
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
    together = Loop(executor).run(mixed_requests(greedy), 10)
    alone = [Loop(executor, seed=1).run([live], 10)[0] for live in mixed_requests(greedy)]
    in_pieces = Loop(executor, limit=5, seed=2).run(mixed_requests(greedy), 10)
    assert together == alone == in_pieces


def test_a_request_resumed_from_its_tokens_goes_on_with_the_same_answer(executor, greedy):
    expected = Loop(executor).run(mixed_requests(greedy), 12)
    halfway = mixed_requests(greedy)
    Loop(executor).run(halfway, 5)
    resumed = [Live(live.prompt, live.sampling, list(live.outputs)) for live in halfway]
    assert Loop(executor, limit=9, seed=3).run(resumed, 12) == expected


def test_a_request_whose_blocks_moved_goes_on_with_the_same_answer(executor, build, greedy):
    expected = Loop(executor).run(mixed_requests(greedy), 12)
    here, there, lives = Loop(executor), Loop(build(), seed=4), mixed_requests(greedy)
    here.run(lives, 5)
    for live in lives:
        there.receive(live, here)
    executor.arena.tensor.fill_(9.0)  # nothing is left to lean on
    assert there.run(lives, 12) == expected


def test_logprobs_come_out_of_a_step(executor, get_twin, greedy):
    live = Live(tuple(range(20)), replace(greedy, num_logprobs=2))
    Loop(executor).run([live], 1)
    expected = get_twin("llama").logits(list(live.prompt))[-1].log_softmax(-1)
    chosen, ids, values = live.logprobs[0]
    assert ids[0] == live.outputs[0] and chosen == values[0]
    assert values == pytest.approx(expected.topk(2).values.tolist(), abs=1e-4)


def test_copies_are_done_before_the_pass(executor, greedy):
    """A shared block is copied when its owner is about to write behind what it shares."""
    tokens = tuple(range(10, 37))
    plain = Chunk(1, 0, tokens, [0, 1], greedy, (tokens, []))
    expected = executor.execute(StepPlan("m", (plain,), ())).tokens
    executor.arena.tensor[2] = 7.0
    tail = Chunk(2, 26, tokens[26:], [0, 2], greedy, (tokens, []))
    assert executor.execute(StepPlan("m", (tail,), ((1, 2),))).tokens == expected


def test_a_plan_of_copies_alone_is_done_and_samples_nothing(executor):
    executor.arena.tensor[3] = 2.0
    result = executor.execute(StepPlan("m", (), ((3, 5),)))
    assert result.tokens == () and (executor.arena.tensor[5] == 2.0).all()


# --- size and life -------------------------------------------------------------------------------


def test_a_step_without_tokens_ends_when_its_kv_is_written(executor, greedy, monkeypatch):
    waited = []
    monkeypatch.setattr("mellmpi.engine.executor.finish", waited.append)
    execute = executor.execute
    last = Chunk(1, 2, (5, 9), [3], greedy, ((3, 1, 5, 9), []))
    execute(StepPlan("m", (last,), ()))
    assert waited == []  # its token on the host says so
    execute(StepPlan("m", (replace(last, sampling=None),), ()))
    execute(StepPlan("m", (), ((3, 7),)))
    assert waited == [executor.arena.device] * 2


def test_the_arena_takes_what_the_configuration_gives_it(executor):
    assert executor.model_kv == ModelKv("tiny", 16, 3 * 2 * 2 * 16 * 16 * 4)
    assert executor.arena.num_blocks == (4 << 20) // executor.model_kv.block_bytes


def test_without_a_number_a_cpu_gives_one_gibibyte(tiny_directory):
    executor = build_executor(tiny_directory(), ModelConfig(), CacheConfig())
    assert 0 <= (1 << 30) - executor.arena.num_bytes < executor.arena.block_bytes


def test_an_arena_of_less_than_a_block_is_refused_by_the_option_to_raise(tiny_directory):
    with pytest.raises(ValueError, match="--kv-cache-memory-bytes"):
        build_executor(tiny_directory(), ModelConfig(), CacheConfig(kv_cache_memory_bytes=100))


def test_the_fingerprint_tells_models_dtypes_and_layouts_apart(tiny_directory):
    directory = tiny_directory()
    configs = [FLOAT32, replace(FLOAT32, model="other"), replace(FLOAT32, dtype="bfloat16")]
    executors = [build_executor(directory, config, CACHE) for config in configs]
    executors.append(build_executor(directory, FLOAT32, CACHE, plain_torch=True))
    assert len({executor.fingerprint for executor in executors}) == 4
    assert build_executor(directory, FLOAT32, CACHE).fingerprint == executors[0].fingerprint


def test_release_gives_the_memory_back_and_building_again_wakes(tiny_directory, greedy):
    cache, prompts = CacheConfig(kv_cache_memory_bytes=300 << 20), random_prompts(3)
    executor = build_executor(tiny_directory(), FLOAT32, cache)
    before = Loop(executor).run([Live(prompt, greedy) for prompt in prompts], 4)
    executor.arena.tensor.fill_(1.0)
    used = psutil.Process().memory_info().rss
    executor.release()
    assert used - psutil.Process().memory_info().rss > 250 << 20
    awake = build_executor(tiny_directory(), FLOAT32, cache)
    assert Loop(awake).run([Live(prompt, greedy) for prompt in prompts], 4) == before


def test_a_cpu_runs_the_kernels_unless_plain_torch_is_asked_for(tiny_directory):
    directory = tiny_directory()
    assert isinstance(build_executor(directory, FLOAT32, CACHE).model, CpuModel)
    plain = build_executor(directory, FLOAT32, CACHE, plain_torch=True)
    assert isinstance(plain.model, TorchModel)


def test_a_shape_the_kernels_do_not_take_runs_in_plain_torch_and_says_so(tiny_directory, caplog):
    odd = replace(CACHE, block_size=5)
    executor = build_executor(tiny_directory(), FLOAT32, odd)
    assert isinstance(executor.model, TorchModel) and "block-size" in caplog.text


def test_a_cuda_device_that_is_not_there_is_refused(tiny_directory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cpu"):
        build_executor(tiny_directory(), ModelConfig(), CACHE, device="cuda")


# --- a real model --------------------------------------------------------------------------------

TEXT = (
    "The old lighthouse keeper had counted ships for forty years, and in all that time he had "
    "never seen one turn back. 12 boats, 7 of them red, left the harbour at dawn; by noon only "
    "3 were visible. What did the others do? Explain step by step, and write a short program. "
)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """(directory, transformers model, tokenizer) of SmolLM2-135M, fp32."""
    directory = checkpoint.resolve("smollm2", tmp_path_factory.mktemp("models"))
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return directory, reference.eval(), transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(("plain_torch", "num_tokens"), [(True, 16), (False, 64)])
def test_smollm2_decodes_greedily_as_transformers_does(plain_torch, num_tokens, smollm2, greedy):
    """Six prompts in one batch; teacher-forced, so that one pass of the reference is enough."""
    directory, reference, tokenizer = smollm2
    config, cache = replace(FLOAT32, model="smollm2"), CacheConfig(kv_cache_memory_bytes=1 << 28)
    executor = build_executor(directory, config, cache, plain_torch=plain_torch)
    text = tokenizer(TEXT * 4).input_ids
    request = replace(greedy, num_logprobs=0)
    lives = [
        Live(tuple(text[start:end]), request)
        for start, end in ((0, 10), (3, 40), (17, 33), (5, 120), (60, 61), (0, 250))
    ]
    Loop(executor, limit=96).run(lives, num_tokens)
    for live in lives:
        with torch.inference_mode():
            logits = reference(torch.tensor([live.tokens[:-1]])).logits[0, len(live.prompt) - 1 :]
        best = logits.topk(2).values
        for row, token in enumerate(live.outputs):
            near = best[row, 0] - best[row, 1] < 1e-4
            assert token == logits[row].argmax() or near, (len(live.prompt), row)
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(live.outputs)[:, None])[:, 0]
        ours = torch.tensor([logprob[0] for logprob in live.logprobs])
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)
