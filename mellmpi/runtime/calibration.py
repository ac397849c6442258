"""What a worker's steps take, tried before the first request comes.

Four steps tell the four coefficients of `core.step_times`: one sequence decodes, eight do, a piece
of a prompt is computed, and the same piece far into a context. No request reads their KV.
"""

from collections.abc import Callable
from typing import Protocol

from mellmpi.costs import ATTENDED, StepSeconds
from mellmpi.protocol import Chunk, HostedModel, Sampling, StepPlan, StepResult

BATCH = 8  # sequences that decode at once
PIECE, LONG_PIECE = 32, 128  # prompt tokens; the long one where it takes no longer than LONG_S
LONG_S = 0.06
FAR = 1024  # positions before the piece that looks back
LEAST = 1e-3  # of a step: what anything in it takes at the least
REPEATS = 2  # of each step, of which the fastest counts: the first one warms up
GREEDY = Sampling(
    max_tokens=1,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    seed=0,
    stop_token_ids=(),
    num_logprobs=None,
)


class Engine(Protocol):
    """What is tried (mellmpi.engine)."""

    @property
    def models(self) -> tuple[HostedModel, ...]: ...
    def execute(self, plan: StepPlan) -> StepResult: ...


def measured_steps(engine: Engine, most_positions: int, clock: Callable[[], float]) -> StepSeconds:
    """Seconds of (a step, a prefilled position, a decoded one, a position looked back on).

    most_positions  of a sequence of the engine's first model
    clock           seconds
    """
    kv = engine.models[0].kv

    def took_s(starts: list[int], num_tokens: int) -> float:
        """The fastest step with a chunk at each start; a chunk of one token is a decode."""
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
    piece = max(1, min(PIECE, most_positions // 2))
    piece_s = took_s([0], piece)
    if piece_s < LONG_S and most_positions >= 2 * LONG_PIECE:
        piece, piece_s = LONG_PIECE, took_s([0], LONG_PIECE)
    prefill_s = max(piece_s - step_s, LEAST * piece_s) / piece
    far = max(1, min(FAR, most_positions - piece))
    attended_s = (took_s([far], piece) - piece_s) / (piece * far)
    # A busy machine may make the later of two steps the faster one.
    return step_s, prefill_s, max(decode_s, LEAST * step_s), max(attended_s, prefill_s / ATTENDED)


def _chunk(start: int, num_tokens: int, block_size: int) -> Chunk:
    """All of its positions are in one block: what is in there matters to nobody."""
    num_blocks = -(-(start + num_tokens) // block_size)
    return Chunk(
        request_id=0,
        start=start,
        tokens=(1,) * num_tokens,
        block_table=[0] * num_blocks,
        sampling=GREEDY if num_tokens == 1 else None,
        history=((1,), []),
    )
