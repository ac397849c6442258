import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mellmpi.engine import sampler
from mellmpi.engine.sampler import sample
from mellmpi.protocol import Chunk

VOCAB = 1000


@pytest.fixture
def chunk(greedy):
    """(settings of the request, position of the new token, prompt, outputs) -> Chunk."""

    def build(position=10, prompt=(), outputs=(), **settings) -> Chunk:
        sampling = replace(greedy, **settings)
        history = (tuple(prompt), list(outputs))
        return Chunk(0, position - 1, (0,), [0], sampling, history)

    return build


def random_logits(rows, vocab=VOCAB, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * spread


def sampled(logits, chunk, n=4000, **settings):
    """Tokens of `n` positions of one request, all with equal logits [vocab]."""
    chunks = [chunk(position=p, temperature=1.0, **settings) for p in range(1, n + 1)]
    return sample(logits.repeat(n, 1), chunks).tokens


def assert_fits(tokens, probabilities):
    """Chi-square, at 6 sigma, over the likely tokens and the rest together."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    expected = probabilities * len(tokens)
    likely = expected >= 5
    counts = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(expected[likely], expected[~likely].sum())
    assert counts[-1] == 0 or expected[-1] > 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    chi = ((counts - expected) ** 2 / expected).sum()
    assert chi <= freedom + 6 * math.sqrt(2 * freedom), (chi, freedom)


# --- greedy --------------------------------------------------------------------------------------


def test_a_temperature_of_zero_takes_the_likeliest_token(chunk):
    logits = random_logits(5)
    assert sample(logits, [chunk()] * 5).tokens == tuple(logits.argmax(-1).tolist())


def test_of_equally_likely_tokens_greedy_takes_the_lowest_id(chunk):
    logits = torch.zeros(3, VOCAB)
    logits[0, [700, 30, 999]] = logits[1, [999, 998]] = 4.0
    assert sample(logits, [chunk()] * 3).tokens == (30, 998, 0)


def test_a_top_k_of_one_is_greedy(chunk):
    logits = torch.zeros(1, VOCAB)
    assert sample(logits, [chunk(temperature=1.5, top_k=1)]).tokens == (0,)


def test_an_all_greedy_batch_samples_nothing_at_random(chunk, monkeypatch):
    monkeypatch.delattr(sampler, "sample_row")
    monkeypatch.delattr(sampler, "token_logprob")
    assert len(sample(random_logits(4), [chunk()] * 4).tokens) == 4


def test_a_step_without_sampled_chunks_has_no_tokens():
    assert sample(torch.empty(0, VOCAB), []).tokens == ()


# --- a row has the same token in any batch -------------------------------------------------------

SETTINGS = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.3, top_k=40),
    dict(temperature=1.0, top_p=0.9),
    dict(temperature=1.0, min_p=0.05),
    dict(temperature=0.9, top_k=100, top_p=0.95, min_p=0.01),
    dict(temperature=1.0, repetition_penalty=1.3, num_logprobs=3),
    dict(presence_penalty=0.7, frequency_penalty=0.4, num_logprobs=0),
]


def mixed_rows(chunk, n, vocab):
    logits = random_logits(n, vocab, seed=1)
    rng = np.random.default_rng(0)
    chunks = [
        chunk(
            position=5 + i,
            prompt=rng.integers(0, vocab, 20).tolist(),
            outputs=rng.integers(0, vocab, 9).tolist(),
            seed=i,
            **SETTINGS[i % len(SETTINGS)],
        )
        for i in range(n)
    ]
    return logits, chunks


@pytest.mark.parametrize("vocab", [131, 1000, 49152])
def test_a_row_has_the_same_token_alone_and_in_any_batch(vocab, chunk):
    n = 24
    logits, chunks = mixed_rows(chunk, n, vocab)
    whole = sample(logits.clone(), chunks)
    for i in range(n):
        alone = sample(logits[i : i + 1].clone(), chunks[i : i + 1])
        assert alone.tokens[0] == whole.tokens[i] and alone.logprobs[0] == whole.logprobs[i]
    order = np.random.default_rng(1).permutation(n)[: n - 5]
    shuffled = sample(logits[order].clone(), [chunks[i] for i in order])
    assert shuffled.tokens == tuple(whole.tokens[i] for i in order)
    assert shuffled.logprobs == tuple(whole.logprobs[i] for i in order)


# --- random numbers ------------------------------------------------------------------------------


def test_random_tokens_depend_on_seed_and_position_only(chunk):
    logits = random_logits(1)[0]
    first = sampled(logits, chunk, n=200, seed=5)
    assert sampled(logits, chunk, n=200, seed=5) == first
    assert sampled(logits, chunk, n=200, seed=6) != first
    assert len(set(first)) > 10


def test_a_random_token_depends_on_its_position_not_on_the_step(chunk):
    """A resumed request computes many positions in one chunk, with the same tokens."""
    logits = random_logits(1)
    stepwise = chunk(position=40, temperature=1.0, seed=3)
    resumed = replace(stepwise, start=0, tokens=(0,) * 40)
    assert sample(logits, [stepwise]).tokens == sample(logits, [resumed]).tokens


# --- distributions -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_the_tempered_softmax(temperature, chunk):
    logits = random_logits(1, vocab=40, spread=1.5)[0]
    chunks = [chunk(position=p, temperature=temperature) for p in range(1, 4001)]
    tokens = sample(logits.repeat(4000, 1), chunks).tokens
    assert_fits(tokens, torch.softmax(logits.double() / temperature, 0).numpy())


def test_top_k_keeps_the_k_likeliest_in_proportion(chunk):
    logits = random_logits(1, vocab=60, spread=1.0)[0]
    kept = torch.full_like(logits, -torch.inf)
    ids = logits.topk(7).indices
    kept[ids] = logits[ids]
    assert_fits(sampled(logits, chunk, top_k=7), torch.softmax(kept.double(), 0).numpy())


def test_a_top_k_beyond_the_vocabulary_keeps_all(chunk):
    logits = random_logits(1, vocab=60)[0]
    assert sampled(logits, chunk, n=300, top_k=10**9) == sampled(logits, chunk, n=300)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_tokens_that_have_the_share_p(top_p, chunk):
    logits = random_logits(1, vocab=60, spread=1.5)[0]
    p = torch.softmax(logits.double(), 0)
    ordered, ids = p.sort(descending=True)
    num_kept = int((ordered.cumsum(0) < top_p).sum()) + 1
    kept = torch.zeros_like(p)
    kept[ids[:num_kept]] = ordered[:num_kept] / ordered[:num_kept].sum()
    assert_fits(sampled(logits, chunk, top_p=top_p), kept.numpy())


def test_min_p_drops_tokens_below_that_share_of_the_likeliest(chunk):
    logits = random_logits(1, vocab=60, spread=1.5)[0]
    p = torch.softmax(logits.double(), 0)
    kept = p * (p >= 0.2 * p.max())
    assert 1 < (kept > 0).sum() < 60
    assert_fits(sampled(logits, chunk, min_p=0.2), (kept / kept.sum()).numpy())


def test_top_p_is_a_share_of_the_tokens_that_top_k_keeps(chunk):
    logits = torch.tensor([4.0, 3, 2, 1]).log()  # 0.4 0.3 0.2 0.1; of the first three 4/9 3/9 2/9
    assert set(sampled(logits, chunk, n=500, top_p=0.75)) == {0, 1, 2}
    assert set(sampled(logits, chunk, n=500, top_k=3, top_p=0.75)) == {0, 1}


def test_a_top_p_of_nearly_nothing_still_keeps_the_likeliest(chunk):
    logits = random_logits(1)[0]
    assert set(sampled(logits, chunk, n=50, top_p=1e-9)) == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [1e-300, 1e-12, 1e-3])
def test_a_vanishing_temperature_is_greedy(temperature, chunk):
    logits = random_logits(6)
    tokens = sample(logits, [chunk(temperature=temperature, seed=i) for i in range(6)]).tokens
    assert tokens == tuple(logits.argmax(-1).tolist())


def test_the_extremes_of_the_random_number_give_possible_tokens(chunk, monkeypatch):
    for u in (0.0, 1 - 2.0**-53):
        monkeypatch.setattr(sampler, "uniforms", lambda seeds, positions, u=u: np.full(1, u))
        logits = random_logits(1)
        logits[0, :3] = logits[0, -3:] = -torch.inf
        token = sample(logits, [chunk(temperature=1.0)]).tokens[0]
        assert 3 <= token < VOCAB - 3


# --- penalties -----------------------------------------------------------------------------------


def test_repetition_penalty_covers_prompt_and_output_and_shrinks_either_sign(chunk):
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.2, 0.5]])
    penalised = logits.clone()
    sampler.penalise(penalised, [chunk(prompt=[0, 2], outputs=[3, 3], repetition_penalty=2.0)])
    assert penalised.tolist() == [[1.0, 1.5, -2.0, pytest.approx(-2.4), 0.5]]


def test_presence_and_frequency_penalties_cover_the_output_alone(chunk):
    logits = torch.zeros(1, 5)
    request = chunk(prompt=[0, 1], outputs=[1, 3, 3], presence_penalty=0.5, frequency_penalty=0.25)
    sampler.penalise(logits, [request])
    assert logits.tolist() == [[0.0, -0.75, 0.0, -1.0, 0.0]]


def test_a_penalty_of_one_request_leaves_the_others_alone(chunk):
    logits = random_logits(3)
    before = logits.clone()
    sampler.penalise(logits, [chunk(), chunk(prompt=[5], repetition_penalty=9.0), chunk()])
    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert (logits[1] != before[1]).nonzero().flatten().tolist() == [5]


def test_a_penalty_can_change_the_greedy_choice(chunk):
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    assert sample(logits, [chunk(outputs=[0], frequency_penalty=1.5)]).tokens == (1,)


# --- logprobs ------------------------------------------------------------------------------------


def test_logprobs_are_of_the_distribution_before_penalties_temperature_and_truncation(chunk):
    logits = random_logits(1)
    expected = torch.log_softmax(logits[0].double(), 0)
    request = chunk(
        temperature=3.0, top_k=5, outputs=[7], repetition_penalty=1.5, seed=4, num_logprobs=6
    )
    result = sample(logits.clone(), [request])
    chosen, ids, values = result.logprobs[0]
    best = expected.topk(6)
    assert chosen == pytest.approx(expected[result.tokens[0]].item(), abs=1e-7)
    assert list(ids) == best.indices.tolist()
    assert values == pytest.approx(best.values.tolist(), abs=1e-7)


def test_only_requests_that_ask_for_logprobs_get_them(chunk):
    result = sample(random_logits(3), [chunk(), chunk(num_logprobs=0), chunk(num_logprobs=2)])
    assert result.logprobs[0] is None
    assert result.logprobs[1][1:] == ((), ())
    assert len(result.logprobs[2][1]) == 2 and result.logprobs[2][1][0] == result.tokens[2]


def test_equal_alternatives_are_listed_by_id(chunk):
    logits = torch.zeros(1, VOCAB)
    logits[0, [900, 20]] = 1.0
    assert sample(logits, [chunk(num_logprobs=4)]).logprobs[0][1] == (20, 900, 0, 1)


def test_more_alternatives_than_tokens_are_all_tokens(chunk):
    assert len(sample(torch.zeros(1, 4), [chunk(num_logprobs=9)]).logprobs[0][1]) == 4
