"""Measures the step times of a worker before the first request.

Four steps determine the four coefficients of `costs.step_times`: decode one sequence, decode eight,
prefill a chunk, and prefill the same chunk far into a context. No request reads their KV.
"""

from collections.abc import Callable
from typing import Protocol

from mellmpi.costs import ATTENDED, StepSeconds
from mellmpi.protocol import GREEDY, Chunk, HostedModel, StepPlan, StepResult

BATCH = 8  # sequences of the decode step
CHUNK, LONG_CHUNK = 32, 128  # prompt tokens; the long one if the short one takes less than LONG_S
LONG_S = 0.06
FAR = 1024  # positions before the chunk far into a context
LEAST = 1e-3  # lower limit of a coefficient, as a share of the step
REPEATS = 2  # the fastest counts: the first one includes the warm-up


class Engine(Protocol):
    """The interface of an engine (mellmpi.engine)."""

    @property
    def models(self) -> tuple[HostedModel, ...]: ...
    def execute(self, plan: StepPlan) -> StepResult: ...


def measured_steps(engine: Engine, most_positions: int, clock: Callable[[], float]) -> StepSeconds:
    """Return seconds of (a step, a prefilled position, a decoded position, an attended position).

    most_positions  limit of a sequence of the engine's first model
    clock           seconds
    """
    kv = engine.models[0].kv

    def took_s(starts: list[int], num_tokens: int) -> float:
        """Return the fastest time of a step with a chunk at each start. One token: a decode."""
        chunks = tuple(_chunk(start, num_tokens, kv.block_size) for start in starts)
        times = []
        for _ in range(REPEATS):
            began_s = clock()
            engine.execute(StepPlan(kv.model, chunks, ()))
            times.append(clock() - began_s)
        return min(times)

    one_s, many_s = took_s([0], 1), took_s([0] * BATCH, 1)
    decode_s = max(0.0, many_s - one_s) / (BATCH - 1)
    step_s = max(one_s - decode_s, 0.1 * one_s)
    chunk = max(1, min(CHUNK, most_positions // 2))
    chunk_s = took_s([0], chunk)
    if chunk_s < LONG_S and most_positions >= 2 * LONG_CHUNK:
        chunk, chunk_s = LONG_CHUNK, took_s([0], LONG_CHUNK)
    prefill_s = max(chunk_s - step_s, LEAST * chunk_s) / chunk
    far = max(1, min(FAR, most_positions - chunk))
    attended_s = (took_s([far], chunk) - chunk_s) / (chunk * far)
    # On a busy machine a difference of two steps may be negative.
    return step_s, prefill_s, max(decode_s, LEAST * step_s), max(attended_s, prefill_s / ATTENDED)


def _chunk(start: int, num_tokens: int, block_size: int) -> Chunk:
    """Return a chunk whose positions are all in block 0, which no request reads."""
    num_blocks = -(-(start + num_tokens) // block_size)
    return Chunk(
        request_id=0,
        start=start,
        tokens=(1,) * num_tokens,
        block_table=[0] * num_blocks,
        sampling=GREEDY if num_tokens == 1 else None,
        history=((1,), []),
    )
