"""Every family against transformers: equal logits for any division of positions into steps."""

import pytest
import torch

from mellmpi.engine import pack
from mellmpi.protocol import StepPlan

TOLERANCE = dict(rtol=1e-4, atol=1e-4)


def test_a_prompt_computed_at_once_has_the_logits_of_transformers(any_twin, paged, sequence):
    run, seq = paged(any_twin), sequence(45)
    torch.testing.assert_close(run.step((seq, 45))[0], any_twin.logits(seq.tokens)[-1], **TOLERANCE)


def test_a_prompt_computed_in_odd_chunks_has_the_same_logits(any_twin, paged, sequence):
    run, seq = paged(any_twin), sequence(45)
    expected = any_twin.logits(seq.tokens)
    for n in (7, 1, 4, 13, 3, 16, 1):
        got = run.step((seq, n))[0]
        torch.testing.assert_close(got, expected[seq.num_computed - 1], **TOLERANCE)


def test_decoding_one_by_one_has_the_same_logits(any_twin, paged, sequence):
    run, seq = paged(any_twin), sequence(40)
    expected = any_twin.logits(seq.tokens)
    run.fill((seq, 25))
    for position in range(25, 40):
        torch.testing.assert_close(run.step((seq, 1))[0], expected[position], **TOLERANCE)


def test_chunks_and_decodes_of_many_sequences_share_a_step(any_twin, paged, sequence):
    run = paged(any_twin)
    seqs = [sequence(length, seed) for seed, length in enumerate((60, 9, 33, 5, 90, 17, 33))]
    expected = [any_twin.logits(seq.tokens) for seq in seqs]
    run.fill(*((seq, n) for seq, n in zip(seqs, (50, 2, 1, 3, 21, 16, 20), strict=True)))
    for amounts in ((1, 1, 5, 1, 30, 1, 1), (1, 6, 1, 1, 5, 0, 1), (3, 0, 9, 0, 9, 0, 9)):
        active = [(seq, n) for seq, n in zip(seqs, amounts, strict=True) if n]
        rows = run.step(*active)
        ends = [logits[seq.num_computed - 1] for seq, logits in zip(seqs, expected, strict=True)]
        ends = [end for end, n in zip(ends, amounts, strict=True) if n]
        torch.testing.assert_close(rows, torch.stack(ends), **TOLERANCE)


def test_only_sampled_chunks_have_logits_and_the_others_still_write_kv(
    get_twin, paged, sequence, greedy
):
    twin = get_twin("llama")
    run, first, second = paged(twin), sequence(20, 1), sequence(21, 2)
    mixed = [run.chunk(first, 20, True), run.chunk(second, 20, False)]
    plan = StepPlan("m", tuple(mixed), ())
    logits = run.model.forward(pack(plan, run.arena.block_size), run.arena)
    assert logits.shape == (1, 131) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[0], twin.logits(first.tokens)[-1], **TOLERANCE)
    torch.testing.assert_close(
        run.step((second, 1))[0], twin.logits(second.tokens)[-1], **TOLERANCE
    )


def test_a_step_writes_only_its_own_blocks(get_twin, paged, sequence):
    run, seq = paged(get_twin("qwen3")), sequence(30)
    run.arena.tensor.fill_(5.0)
    run.step((seq, 30))
    others = sorted(set(range(run.arena.num_blocks)) - set(seq.table))
    assert (run.arena.tensor[others] == 5.0).all()


@pytest.mark.parametrize("variant", ["llama", "llama3-rope", "mistral-window", "qwen2", "qwen3"])
def test_bfloat16_is_as_exact_as_in_transformers(variant, get_twin, paged, sequence):
    exact, rounded = get_twin(variant), get_twin(variant, torch.bfloat16)
    run, seq = paged(rounded, torch.bfloat16), sequence(45)
    rounded_weights = {k: v.float() for k, v in rounded.weights().items()}
    reference = type(exact.reference)(exact.reference.config).eval()
    reference.load_state_dict(rounded_weights, strict=False)
    expected = reference(torch.tensor([seq.tokens])).logits[0].detach()
    theirs = (rounded.logits(seq.tokens) - expected).abs().mean()
    run.fill((seq, 20))
    ours = [run.step((seq, 1))[0] - expected[position] for position in range(20, 45)]
    assert torch.stack(ours).abs().mean() < 1.5 * theirs
