"""Data between the batch scheduler and its engine. Never sent over the wire."""

from dataclasses import dataclass

from mellmpi.protocol.request import PromptLogprob, Sampling, TokenLogprob
from mellmpi.protocol.workers import ModelKv


@dataclass(frozen=True, slots=True)
class HostedModel:
    """Engine → batch scheduler: a model of this worker. All models share the arena's blocks."""

    kv: ModelKv
    fingerprint: str  # of the KV layout: blocks move only between workers where it is equal


@dataclass(frozen=True, slots=True)
class Scoring:
    """The tokens of a prompt whose logprobs a step reports."""

    tokens: tuple[int, ...]  # that follow the first positions of the chunk; at least one
    num_logprobs: int  # alternatives to report for each of them


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence that one step computes."""

    request_id: int
    start: int  # position of the first token; KV of all earlier positions is present
    tokens: tuple[int, ...]  # their KV is written at start … start + len(tokens) - 1
    block_table: list[int]  # physical block of each logical block; owned by the batch scheduler
    sampling: Sampling | None  # None: nothing is sampled, as the prompt ends in a later chunk
    history: tuple[tuple[int, ...], list[int]]  # (prompt, outputs): for penalties
    scoring: Scoring | None = None  # None: nothing is scored


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass of one model. Sampled chunks first, in the order of their tokens."""

    model: str
    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...]  # (from, to) physical blocks, done before the pass


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a forward pass: one token for each sampled chunk; all in plan order."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]  # None where the request asked for none
    prompt_logprobs: tuple[tuple[PromptLogprob, ...], ...] = ()  # of each scored chunk
