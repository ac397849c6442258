import math

import numpy as np
import pytest
import torch

from mellmpi.engine.random_sampling import (
    ONE,
    RowSampling,
    fixed_point_probabilities,
    invert_cdf,
    sample_row,
    sample_rows,
    uniforms,
)


def random_logits(rows, vocab, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * spread


def test_uniforms_are_uniform_and_do_not_repeat_along_a_request_or_across_seeds():
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.uint64))
    u = uniforms(seeds.ravel(), positions.ravel())
    assert (u >= 0).all() and (u < 1).all() and len(np.unique(u)) == u.size
    counts = np.histogram(u, 50, (0, 1))[0]
    assert ((counts - u.size / 50) ** 2 / (u.size / 50)).sum() < 49 + 6 * math.sqrt(98)
    grid = u.reshape(200, 200)
    neighbours = (grid[1:].ravel(), grid[:-1].ravel()), (grid[:, 1:].ravel(), grid[:, :-1].ravel())
    assert all(abs(np.corrcoef(*pair)[0, 1]) < 0.03 for pair in neighbours)


def test_uniforms_are_the_splitmix64_finalizer():
    def finalize(x):
        mask = 2**64 - 1
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        return x ^ x >> 31

    seed, position = 2**64 - 3, 77
    expected = (finalize((finalize(seed) + position) % 2**64) >> 11) / 2**53
    assert uniforms(np.array([seed], np.uint64), np.array([position], np.uint64))[0] == expected


@pytest.mark.parametrize("vocab", [131, 4097, 49152])
def test_fixed_point_probabilities_have_the_same_bits_at_any_offset(vocab):
    logits = random_logits(1, vocab, spread=5.0)[0].numpy()
    expected, buffer = fixed_point_probabilities(logits, 0.7), np.empty(vocab + 40, np.float32)
    for offset in range(33):
        buffer[offset : offset + vocab] = logits
        assert np.array_equal(
            fixed_point_probabilities(buffer[offset : offset + vocab], 0.7), expected
        )


def random_sampling(rng):
    off = rng.random(3) < 0.4
    return RowSampling(
        uniform=rng.random(),
        temperature=rng.choice([0.3, 0.9, 1.7]),
        min_p=0.0 if off[0] else rng.choice([1e-4, 0.05, 1.0]),
        top_k=0 if off[1] else int(rng.choice([1, 2, 20, 300, 10**6])),
        top_p=1.0 if off[2] else rng.choice([1e-6, 0.3, 0.9, 0.9999]),
    )


@pytest.mark.parametrize("vocab", [1, 7, 300, 5000])
def test_rows_sampled_together_are_sampled_as_one_by_one(vocab):
    """The two functions differ only in their exp, by far less than sampling can resolve."""
    rng = np.random.default_rng(vocab)
    logits, samplings = (
        random_logits(200, vocab, seed=vocab),
        [random_sampling(rng) for _ in range(200)],
    )
    alone = [
        sample_row(row.numpy(), sampling) for row, sampling in zip(logits, samplings, strict=True)
    ]
    assert sample_rows(logits, samplings).tolist() == alone


@pytest.mark.parametrize("vocab", [7, 300, 5000])
def test_equal_logits_are_truncated_together_by_both_functions(vocab):
    rng = np.random.default_rng(vocab)
    logits = random_logits(200, vocab, seed=vocab).round()
    samplings = [random_sampling(rng) for _ in range(200)]
    alone = [
        sample_row(row.numpy(), sampling) for row, sampling in zip(logits, samplings, strict=True)
    ]
    assert sample_rows(logits, samplings).tolist() == alone


@pytest.mark.parametrize("length", [1, 5, 256, 257, 1000])
def test_each_token_is_sampled_in_proportion_to_its_probability(length):
    probabilities = np.random.default_rng(length).integers(0, 3, length).astype(np.float64)
    probabilities[256:258] = 0  # a run that begins with zeros
    probabilities[-1] = 1
    total = int(probabilities.sum())
    tokens = [
        invert_cdf(probabilities, (4 * i + part) / (4 * total))
        for i in range(total)
        for part in (1, 3)
    ]
    assert np.array_equal(np.bincount(tokens, minlength=length), 2 * probabilities)


@pytest.mark.parametrize("total", [1.0, 3.0, 2.0**34 + 1, 2.0**50 - 1, 2.0**52])
def test_the_greatest_uniform_still_gives_a_token(total):
    assert invert_cdf(np.array([0.0, total, 0.0]), 1 - 2.0**-53) == 1


def test_fixed_point_probabilities_are_whole_numbers():
    probabilities = fixed_point_probabilities(random_logits(1, 5000)[0].numpy(), 0.7)
    assert probabilities.max() == ONE and (probabilities == probabilities.round()).all()


def test_sums_of_fixed_point_probabilities_are_exact():
    probabilities = fixed_point_probabilities(np.zeros(2**18, np.float32), 1.0)
    assert probabilities.cumsum()[-1] == 2.0**52 == probabilities[::-1].sum()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_logits_that_are_not_finite_still_give_a_token(uniform):
    sampling = RowSampling(uniform, 1.0, 0.0, 0, 0.9)
    for value in (torch.nan, torch.inf, -torch.inf):
        logits = torch.full((1, 50), value)
        assert 0 <= sample_row(logits[0].numpy(), sampling) < 50
        assert 0 <= sample_rows(logits, [sampling]).item() < 50


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e300, 1.7e308])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_extreme_temperatures_give_a_token(temperature, uniform):
    """Temperatures beyond float32's range, with a logit of -inf that must not be sampled."""
    logits = np.array([1.0, -np.inf, 3.0, 2.0] * 100, np.float32)
    for sampling in (
        RowSampling(uniform, temperature, 0.0, 0, 1.0),
        RowSampling(uniform, temperature, 0.1, 3, 0.9),
    ):
        token = sample_row(logits, sampling)
        assert logits[token] > -np.inf
        assert sample_rows(torch.from_numpy(logits)[None], [sampling]).item() == token
