"""Prompts and lengths of each kind of dataset."""

import json
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mellmpi.loadgen import BenchOptions, made_up
from mellmpi.loadgen.datasets import read_dataset
from mellmpi.loadgen.made_up import WORDS, MadeUp, Vocabulary

WORD = re.compile(" [A-Za-z]+")
TEXT = ["the quick brown fox jumps over the lazy dog", "naïve 日本 — the time of people"] * 50


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with the tokenizer.json of a small byte-level BPE vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    backend.train_from_iterator(TEXT, trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def vocabulary(directory):
    return Vocabulary.load(str(directory))


def dataset(vocabulary=None, **options):
    return read_dataset(BenchOptions(**options), vocabulary)


def written(tmp_path, content):
    path = tmp_path / "data"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_random_lengths_lie_in_the_range_and_depend_on_the_seed_alone():
    given = {"num_prompts": 200, "random_input_len": 100, "random_output_len": 10}
    found = dataset(**given, random_range_ratio=0.3, seed=1).prompts
    assert {70, 130} <= {p.prompt_tokens for p in found} <= set(range(70, 131))
    assert {7, 13} <= {p.output_tokens for p in found} <= set(range(7, 14))
    assert all(len(p.prompt.split()) == p.prompt_tokens for p in found)
    assert found == dataset(**given, random_range_ratio=0.3, seed=1).prompts
    assert found != dataset(**given, random_range_ratio=0.3, seed=2).prompts
    fixed = dataset(**given).prompts
    assert {(p.prompt_tokens, p.output_tokens) for p in fixed} == {(100, 10)}


def test_random_prompts_share_the_prefix_alone():
    found = dataset(
        num_prompts=3, random_input_len=20, random_prefix_len=5, prompt_form="ids"
    ).prompts
    assert len({tuple(p.prompt[:5]) for p in found}) == 1
    assert len({tuple(p.prompt[5:]) for p in found}) == 3
    assert all(p.prompt_tokens == len(p.prompt) == 25 for p in found)
    assert all(300 <= token < 1000 for p in found for token in p.prompt)


def test_made_up_text_has_the_tokens_that_it_says(vocabulary):
    for number in (1, 7, 100):
        for seed in range(20):
            text, found = MadeUp(vocabulary, False, seed).prompt([], number)
            assert vocabulary.count(text) == found
            assert abs(found - number) <= 2


def test_ids_of_a_vocabulary_are_not_special(vocabulary):
    ids = set(MadeUp(vocabulary, True, 0).tokens(5_000))
    assert not ids & {0, 1} and max(ids) < 400


def test_prompts_are_made_of_the_words_of_a_vocabulary_that_has_some(directory, monkeypatch):
    monkeypatch.setattr(made_up, "FEW", 3)
    vocabulary = Vocabulary.load(str(directory))
    assert len(vocabulary.ids) >= 3
    assert all(WORD.fullmatch(vocabulary.decode([i])) for i in vocabulary.ids)
    text, found = MadeUp(vocabulary, False, 0).prompt([], 200)
    assert found == vocabulary.count(text) == len(text.split()) == 200


def test_the_words_of_made_up_text_differ():
    assert len(set(WORDS)) == len(WORDS) > 100


CONVERSATIONS = [
    {
        "conversations": [
            {"from": "human", "value": "x " * n},
            {"from": "gpt", "value": "x " * m},
        ]
    }
    for n, m in [(10, 10), (20, 30), (1, 10), (10, 1), (600, 10), (450, 650)]
]


def test_conversations_give_first_turns_of_usual_length(tmp_path, vocabulary):
    others = [{"conversations": []}, {"conversations": [{"value": "alone"}]}, {}, {"id": 1}]
    path = written(tmp_path, CONVERSATIONS + others)
    given = {"dataset_name": "sharegpt", "dataset_path": path, "num_prompts": 100}
    found = dataset(vocabulary, **given, no_oversample=True, disable_shuffle=True).prompts
    kept = [turns["conversations"] for turns in CONVERSATIONS[:2]]
    assert [p.prompt for p in found] == [prompt["value"] for prompt, _ in kept]
    assert [p.prompt_tokens for p in found] == [vocabulary.count(p["value"]) for p, _ in kept]
    assert [p.output_tokens for p in found] == [vocabulary.count(a["value"]) for _, a in kept]
    assert len(dataset(vocabulary, **given).prompts) == 100


def test_conversations_need_a_tokenizer_or_a_length(tmp_path):
    given = {"dataset_name": "sharegpt", "dataset_path": written(tmp_path, CONVERSATIONS)}
    with pytest.raises(ValueError, match="--tokenizer DIR"):
        dataset(**given)
    found = dataset(**given, sharegpt_output_len=9, num_prompts=6).prompts
    assert {(p.prompt_tokens, p.output_tokens) for p in found} == {(0, 9)} and len(found) == 6


def test_the_order_is_shuffled_by_the_seed(tmp_path):
    path = written(tmp_path, "".join(f'{{"prompt": "{i}"}}\n' for i in range(50)))
    given = {"dataset_name": "custom", "dataset_path": path, "num_prompts": 50}
    orders = {tuple(p.prompt for p in dataset(**given, seed=i).prompts) for i in (1, 1, 2)}
    assert len(orders) == 2 and all(sorted(order, key=int)[0] == "0" for order in orders)


def test_custom_prompts_have_the_length_of_the_flag_else_of_the_line_else_256(tmp_path):
    path = written(tmp_path, '{"prompt": "a", "output_tokens": 7}\n\n{"prompt": "b"}\n')
    given = {"dataset_name": "custom", "dataset_path": path, "disable_shuffle": True}
    found = dataset(**given, num_prompts=2).prompts
    assert [(p.prompt, p.output_tokens) for p in found] == [("a", 7), ("b", 256)]
    found = dataset(**given, num_prompts=2, custom_output_len=3).prompts
    assert [p.output_tokens for p in found] == [3, 3]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("custom", '{"prompt": "a"}\n{"text": "b"}\n', "line 2"),
        ("custom", '{"prompt": "a", "output_tokens": "many"}', "line 1"),
        ("custom", '{"prompt": "a", "output_tokens": 0}', "line 1"),
        ("custom", "[1]", "line 1"),
        ("custom", "\n", "no usable prompt"),
        ("sharegpt", "{}", "JSON list"),
        ("sharegpt", "[", "is not JSON"),
        ("sharegpt", "[]", "no usable prompt"),
        ("trace", "a,b\n1,2\n", "unknown columns"),
    ],
)
def test_a_wrong_file_is_named(name, content, said, tmp_path, vocabulary):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=said) as caught:
        dataset(vocabulary, dataset_name=name, dataset_path=path)
    assert path in str(caught.value)


def test_a_trace_gives_arrivals_and_lengths(tmp_path):
    rows = "arrival_s,prompt_tokens,output_tokens\n0.5,10,3\n1.5,20,4\n4,30,5\n"
    given = {"dataset_name": "trace", "dataset_path": written(tmp_path, rows)}
    found = dataset(**given, num_prompts=2, rate_scale=2.0, length_scale=3.0, prompt_form="ids")
    assert found.arrival_s.tolist() == [0.25, 0.75]
    assert [(len(p.prompt), p.output_tokens) for p in found.prompts] == [(30, 9), (60, 12)]
    assert len(dataset(**given).prompts) == 3 and "uniform format" in found.source


@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"--tokenizer {tmp_path} cannot be read"):
        Vocabulary.load(str(tmp_path))


def test_a_directory_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer"):
        Vocabulary.load(str(tmp_path))
