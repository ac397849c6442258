"""Biases, allowed ids and minimum lengths against plain reference code."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.engine import restrictions
from mellmpi.engine.random_sampling import sample_row
from mellmpi.engine.restrictions import restrict
from mellmpi.engine.sampler import row_samplings, sample
from mellmpi.protocol import GREEDY, Chunk

VOCAB = 21  # no multiple of 8
IDS = st.integers(0, VOCAB - 1)
SETTINGS = st.fixed_dictionaries(
    {
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(IDS, max_size=3, unique=True).map(tuple),
        "logit_bias": st.dictionaries(IDS, st.floats(-100, 100, width=32), max_size=4).map(
            lambda biases: tuple(biases.items())
        ),
        "allowed_token_ids": st.lists(IDS, max_size=4, unique=True).map(tuple),
    }
)
ROWS = st.lists(st.tuples(SETTINGS, st.lists(IDS, max_size=4)), min_size=1, max_size=4)


def chunk_of(settings, outputs, **more) -> Chunk:
    sampling = replace(GREEDY, max_tokens=9, **settings, **more)
    return Chunk(0, len(outputs), (0,), [0], sampling, ((1,), outputs))


def restricted(logits: list[float], settings, outputs) -> list[float]:
    """Reference code for one row."""
    biases = dict(settings["logit_bias"])
    values = [np.float32(x) + np.float32(biases.get(i, 0.0)) for i, x in enumerate(logits)]
    may = set(settings["allowed_token_ids"] or range(VOCAB))
    if len(outputs) < settings["min_tokens"]:
        longer = may - set(settings["stop_token_ids"])
        may = longer or may
    return [float(x) if i in may else -math.inf for i, x in enumerate(values)]


@given(rows=ROWS, seed=st.integers(0, 99))
def test_they_do_what_plain_code_does_and_a_row_does_not_depend_on_others(rows, seed):
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed))
    expected = [restricted(r.tolist(), *row) for r, row in zip(logits, rows, strict=True)]
    chunks = [chunk_of(*row) for row in rows]
    together = logits.clone()
    restrict(together, chunks, {})
    assert together.tolist() == expected
    for row, chunk in enumerate(chunks):
        alone = logits[row : row + 1].clone()
        restrict(alone, [chunk], {})
        assert alone[0].tolist() == expected[row]


@given(
    masks=st.lists(st.sets(IDS, min_size=1), min_size=1, max_size=3),
    vocab=st.integers(VOCAB, VOCAB + 9),
)
def test_masks_on_devices_are_those_on_cpus(masks, vocab):
    rows = {2 * row: restrictions._mask_of(list(ids), vocab) for row, ids in enumerate(masks)}
    logits = torch.randn(6, vocab)
    expected = logits.clone()
    for row, ids in enumerate(masks):
        banned = [i for i in range(vocab) if i not in ids]
        expected[2 * row, banned] = -torch.inf
    by_rows = logits.clone()
    for row, mask in rows.items():
        restrictions._keep(by_rows[row].numpy(), mask)
    restrictions._mask(logits, rows)
    assert torch.equal(logits, expected) and torch.equal(by_rows, expected)


@pytest.mark.parametrize("kind", [{}, {"temperature": 2.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_sampling_keeps_to_the_allowed_ids(kind):
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(1, VOCAB, generator=generator)
        chunk = chunk_of({"allowed_token_ids": (3, 20)}, [], seed=seed, **kind)
        assert sample(logits, [chunk]).tokens[0] in (3, 20)


KINDS = [{}, {"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.05}, {"top_k": 700, "top_p": 0.5}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("num_allowed", [1, 2, 300, 4990])
def test_the_others_do_not_take_part_in_the_choice(kind, num_allowed):
    """The same token as from the whole row, where they have the logit -inf."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(1, 5000, generator=generator) * 3
        ids = torch.randperm(5000, generator=generator)[:num_allowed].tolist()
        chunk = chunk_of({"allowed_token_ids": tuple(ids)}, [], temperature=1.3, seed=seed, **kind)
        (token,) = sample(logits.clone(), [chunk]).tokens
        restrict(logits, [chunk], {})
        (setting,) = row_samplings([chunk])
        assert token == sample_row(logits[0].numpy(), setting)


def test_a_bias_comes_after_penalties_and_lifts_no_restriction():
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 4.0, 3.0
    settings = {"repetition_penalty": 2.0, "logit_bias": ((5, 1.5), (9, 100.0))}
    chunk = chunk_of(settings, [5], allowed_token_ids=(5, 6))
    assert sample(logits.clone(), [chunk]).tokens == (5,)  # 4 / 2 + 1.5
    assert sample(logits, [chunk_of(settings, [5])]).tokens == (9,)


def test_logprobs_are_those_of_the_model():
    logits = torch.zeros(1, VOCAB)
    chunk = chunk_of({"allowed_token_ids": (7,), "logit_bias": ((7, -3.0),)}, [], num_logprobs=0)
    result = sample(logits, [chunk])
    assert result.tokens == (7,) and result.logprobs[0] is not None
    assert result.logprobs[0][0] == pytest.approx(-math.log(VOCAB))


def test_a_minimum_length_delays_the_stop_token():
    outputs: list[int] = []
    while len(outputs) < 9 and 2 not in outputs:
        logits = torch.zeros(1, VOCAB)
        logits[0, 2], logits[0, 4] = 9.0, 1.0
        chunk = chunk_of({"min_tokens": 3, "stop_token_ids": (2,)}, outputs)
        outputs += sample(logits, [chunk]).tokens
    assert outputs == [4, 4, 4, 2]
