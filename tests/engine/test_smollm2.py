"""From the weights of SmolLM2-135M to the tokens that transformers generates."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mellmpi.config import CacheConfig, ModelConfig
from mellmpi.engine import build_executor
from mellmpi.protocol import GREEDY, Request
from tests.engine.decoding import ChunkScheduler, LiveRequest, Rank0

TEXT = (
    "The old lighthouse keeper had counted ships for forty years, and in all that time he had "
    "never seen one turn back. 12 boats, 7 of them red, left the harbour at dawn; by noon only "
    "3 were visible. What did the others do? Explain step by step, and write a short program. "
)


@pytest.mark.parametrize(("plain_torch", "num_tokens"), [(True, 16), (False, 64)])
def test_smollm2_decodes_greedily_as_transformers_does(plain_torch, num_tokens, smollm2, greedy):
    """Six prompts in one batch; teacher-forced, so that one pass of the reference is enough."""
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = ModelConfig(model="smollm2", dtype="float32")
    cache = CacheConfig(kv_cache_memory_bytes=1 << 28)
    executor = build_executor(smollm2, config, cache, plain_torch=plain_torch)
    text = tokenizer(TEXT * 4).input_ids
    request = replace(greedy, num_logprobs=0)
    lives = [
        LiveRequest(tuple(text[start:end]), request)
        for start, end in ((0, 10), (3, 40), (17, 33), (5, 120), (60, 61), (0, 250))
    ]
    ChunkScheduler(executor, limit=96).run(lives, num_tokens)
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


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-4), ("bfloat16", 0.15)])
def test_smollm2_scores_a_prompt_as_transformers_does(dtype, atol, smollm2):
    """The reference is in float32; `atol` is about twice the greatest error."""
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    prompt = AutoTokenizer.from_pretrained(smollm2)(TEXT).input_ids
    with torch.inference_mode():
        rows = reference(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    expected = rows.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
    cache = CacheConfig(kv_cache_memory_bytes=1 << 28)
    executor = build_executor(smollm2, ModelConfig(model="smollm2", dtype=dtype), cache)
    request = Request(
        0, "smollm2", tuple(prompt), replace(GREEDY, num_prompt_logprobs=1), None, 0, None
    )
    scored = Rank0(executor, num_tokens=48).run([request])[0]
    ours = torch.tensor([row[0] for row, _ in scored])
    print(
        dtype,
        (ours - expected).abs().max(),
        (ours - expected).abs().mean(),
        ours.sum(),
        expected.sum(),
        len(ours),
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)
    assert (ours - expected).abs().mean() < atol / 5
    assert ours.sum().item() == pytest.approx(expected.sum().item(), rel=0.01)
