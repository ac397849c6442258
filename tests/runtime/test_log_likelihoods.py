"""Log-likelihoods as evaluation harnesses ask for them, of requests that move at random."""

import json
from functools import partial

import pytest

from mellmpi.config import CacheConfig, ModelConfig
from mellmpi.engine import build_engine, build_executor, pack
from mellmpi.files import LineReader
from mellmpi.frontend import BatchJob, ServedModel, ServedModels, Tokenizer
from mellmpi.models import resolve
from mellmpi.protocol import GREEDY, Chunk, StepPlan
from mellmpi.runtime.batch_front import BatchFront
from tests.runtime.cell import Cell

MODEL = ModelConfig(model="tiny-llama", dtype="float32")
CACHE = CacheConfig(kv_cache_memory_bytes=2 << 20)
PAIRS = [
    ("The old lighthouse keeper", " counted ships."),
    ("12 boats, 7 of them red, left the harbour at dawn;" * 3, " 3 were visible."),
    ("née naïve", " café über straße"),
    ("日本語", " テキスト です 👍🏽"),
    ("a", "b"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return resolve("random:tiny-llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def log_likelihood(directory):
    """(tokens, n) -> that of all tokens from index n on: a forward pass of each prefix."""
    executor = build_executor(directory, MODEL, CACHE, device="cpu", plain_torch=True)
    size = executor.arena.block_size

    def of_prefix(tokens, end):
        table = list(range(-(-end // size)))
        chunk = Chunk(0, 0, tokens[:end], table, GREEDY, ((), []))
        logits = executor.model.forward(pack(StepPlan("m", (chunk,), ()), size), executor.arena)
        return logits[0].double().log_softmax(-1)[tokens[end]].item()

    return lambda tokens, n: sum(of_prefix(tokens, end) for end in range(n, len(tokens)))


def entry(custom_id, **body):
    url = "/v1/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def lines(tokenizer):
    """Each pair as token ids and as text, among requests that only decode."""
    for i, (context, continuation) in enumerate(PAIRS):
        text = context + continuation
        options = dict(echo=True, logprobs=1, seed=1234, temperature=0)
        yield entry(f"{i} ids", prompt=[tokenizer.encode(text)], max_tokens=1, **options)
        yield entry(f"{i} text", prompt=text, max_tokens=0, **options)
        yield entry(f"{i} longer", prompt=text, max_tokens=60, ignore_eos=True, **options)
        for k in range(3):
            yield entry(f"{i} {k}", prompt=text[: 5 + k], max_tokens=90, ignore_eos=True)


def answers(directory, tokenizer):
    """Choices by custom_id, and the number of moves."""
    pieces = [b"".join(json.dumps(line).encode() + b"\n" for line in lines(tokenizer)), b""]
    written = []
    served = ServedModel(name="tiny-llama", max_model_len=500, vocab_size=512, eos_ids=(2,))
    reader = LineReader(lambda: pieces.pop(0))
    job = BatchJob(reader, written.append, ServedModels.of((served, tokenizer)))
    model = partial(build_engine, [directory], [MODEL], CACHE, hosted=("tiny-llama",))
    build = partial(model, device="cpu", num_threads=1)
    cell = Cell([build] * 3, migrate="stress", policy="worst_fit")
    cell.run(BatchFront(job, None))
    results = [json.loads(line) for line in written]
    assert not [result for result in results if result["error"]]
    found = {r["custom_id"]: r["response"]["body"]["choices"][0] for r in results}
    return found, cell.metrics.report(1.0)["migrations"]


def test_they_are_those_of_plain_forward_passes(directory, tokenizer, log_likelihood):
    choices, moves = answers(directory, tokenizer)
    assert all(moves[mode] > 0 for mode in ("transfer", "recompute", "split")), moves
    for i, (context, continuation) in enumerate(PAIRS):
        tokens, n = tuple(tokenizer.encode(context + continuation)), len(tokenizer.encode(context))
        expected = log_likelihood(tokens, n)
        for name, num_more in (("ids", 1), ("text", 0), ("longer", 60)):
            choice = choices[f"{i} {name}"]
            columns = choice["logprobs"]
            values = columns["token_logprobs"]
            assert len(values) == len(tokens) + num_more and values[0] is None
            assert sum(values[n : len(tokens)]) == pytest.approx(expected, abs=1e-5)
            assert "".join(columns["tokens"]) == choice["text"]
            assert choice["text"].startswith(context + continuation)
