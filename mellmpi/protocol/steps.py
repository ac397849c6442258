"""What the batch scheduler and its engine tell each other. Never on the wire."""

from dataclasses import dataclass

from mellmpi.protocol.request import Sampling, TokenLogprob
from mellmpi.protocol.workers import ModelKv


@dataclass(frozen=True, slots=True)
class HostedModel:
    """Engine → batch scheduler: a model of this worker; all share its arena's blocks."""

    kv: ModelKv
    fingerprint: str  # of the KV layout: blocks travel between workers where it is the same


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence computed in one step."""

    request_id: int
    start: int  # position of the first token; KV of all before it is in place
    tokens: tuple[int, ...]  # their KV is written at start … start + len(tokens) - 1
    block_table: list[int]  # physical block of every logical one; owned by the batch scheduler
    sampling: Sampling | None  # None: this chunk ends before the sequence has caught up
    history: tuple[tuple[int, ...], list[int]]  # (prompt, outputs): for penalties


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass of one model. Sampled chunks first, in the order of their tokens."""

    model: str
    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...]  # (from, to) physical blocks, done before the pass


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a forward pass produced: one token for each sampled chunk, in plan order."""

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]  # None where the request asked for none
