"""A worker runs millions of steps: none may leak memory."""

import gc
import sys
import tracemalloc
from dataclasses import replace

import pytest
import torch

from mellmpi.engine import pack
from mellmpi.engine.sampler import sample
from mellmpi.protocol import Chunk, StepPlan

STEPS = 150


@pytest.fixture
def step(paged, get_twin, greedy):
    """One step of three sequences, among them a prefill and random sampling."""
    served = paged(get_twin("llama"))
    hot = replace(greedy, temperature=0.8, num_logprobs=2)
    parts = [(range(7), greedy), (range(3), hot), (range(20), None)]
    plan = StepPlan(
        "m",
        tuple(
            Chunk(
                i, 0, tuple(tokens), list(range(10 * i, 10 * i + 8)), sampling, (tuple(tokens), [])
            )
            for i, (tokens, sampling) in enumerate(parts)
        ),
        (),
    )

    def step():
        with torch.inference_mode():
            logits = served.model.forward(pack(plan, served.arena.block_size), served.arena)
            sample(logits, plan.chunks[:2])

    step.model = served.model
    return step


def held(step):
    for _ in range(STEPS):
        step()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_steps_leak_no_memory(step):
    step()
    tracemalloc.start()  # numpy reports its arrays to it
    try:
        before = held(step)
        assert held(step) - before < 500 * STEPS  # tracing itself takes some
    finally:
        tracemalloc.stop()


def test_steps_leak_no_reference_to_weights_or_scratch(step, model_class):
    step()
    parts = [*step.model._weights, *step.model._scratch] if model_class == "cpu" else []
    before = [sys.getrefcount(part) for part in parts]
    for _ in range(10):
        step()
    assert [sys.getrefcount(part) for part in parts] == before
