"""The prompts of the package are valid and varied, for any model."""

import json
from collections import Counter
from importlib.resources import files

import pytest

from mellmpi.files import LineReader
from mellmpi.frontend import BatchJob, ServedModel, ServedModels, Tokenizer

DEMO = files("mellmpi.frontend").joinpath("demo_prompts.jsonl").read_bytes()
ENTRIES = [json.loads(line) for line in DEMO.splitlines()]


@pytest.fixture(scope="module")
def requests(smollm2):
    model = ServedModel(name="any", max_model_len=2048, vocab_size=49152, eos_ids=(2,))
    pieces, written = [DEMO, b""], []
    job = BatchJob(
        LineReader(lambda: pieces.pop(0)),
        written.append,
        ServedModels.of((model, Tokenizer.load(smollm2))),
    )
    found = list(job.requests())
    assert not written, b"".join(written).decode()
    return found


def test_every_demo_prompt_is_accepted_under_any_model_name(requests):
    assert len(requests) == len(ENTRIES) >= 48
    assert not any("model" in entry["body"] for entry in ENTRIES)


def test_demo_prompts_are_short_and_long_and_of_both_kinds(requests):
    lengths = [len(request.prompt) for request in requests]
    assert sum(600 <= length <= 900 for length in lengths) >= 6 and min(lengths) < 20
    outputs = [request.sampling.max_tokens for request in requests]
    assert min(outputs) == 24 and max(outputs) == 320
    kinds = Counter(entry["url"] for entry in ENTRIES)
    assert min(kinds["/v1/completions"], kinds["/v1/chat/completions"]) >= 8


def test_most_demo_prompts_are_greedy_and_the_others_have_a_seed():
    sampled = [entry["body"] for entry in ENTRIES if entry["body"]["temperature"] > 0]
    assert 4 <= len(sampled) < len(ENTRIES) / 4
    assert all("seed" in body for body in sampled)
    assert sum("stop" in entry["body"] for entry in ENTRIES) >= 3
