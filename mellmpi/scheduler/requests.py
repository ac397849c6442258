"""A request on rank 0: its state, its owner, and the log of its output tokens."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from mellmpi.protocol import Request, TokenLogprob
from mellmpi.scheduler.planner import Plan


class State(Enum):
    WAITING = "waiting"  # in the queue, on no worker
    RUNNING = "running"  # owned by one worker
    RESERVING = "reserving"  # owned; a destination has been asked to reserve blocks
    SENDING = "sending"  # owned; the owner sends KV, the destination will answer


MAX_OWNER_DEATHS = 3  # in a row without a new token: the request is taken to be the cause

ALLOWED = {
    State.WAITING: {State.RUNNING},
    State.RUNNING: {State.RESERVING, State.WAITING},
    State.RESERVING: {State.SENDING, State.RUNNING, State.WAITING},
    State.SENDING: {State.RUNNING, State.WAITING},
}


@dataclass(frozen=True, slots=True)
class Forecast:
    """The expected time to the first token, in two parts; before corrections (`first_token`)."""

    wait_s: float  # in the queue, until a worker has room
    prefill_s: float  # from there to the first token


@dataclass(slots=True)
class KvOffer:
    """An offer of a request to a destination, while KV is reserved for it and sent."""

    dst: int
    epoch: int  # of the destination's assignment if the migration succeeds
    start: int  # positions before it are recomputed by the destination


class Log(Protocol):
    """The output tokens of one request, in order. KV is a cache that can be computed from it."""

    @property
    def tokens(self) -> Sequence[int]: ...

    def merge(self, first: int, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Append the new part of a run and return it. Idempotent; AssertionError on a gap."""
        ...


@dataclass(slots=True)
class TokenLog:
    """A log in a list."""

    tokens: list[int] = field(default_factory=list)

    def merge(self, first: int, tokens: tuple[int, ...]) -> tuple[int, ...]:
        known = len(self.tokens) - first
        assert known >= 0, f"gap: have {len(self.tokens)}, run starts at {first}"
        new = tokens[known:] if known else tokens  # mostly the whole run is new
        self.tokens.extend(new)
        return new


@dataclass(slots=True, eq=False)
class Record:
    """A live request. `move` is the only way to change its state."""

    request: Request
    arrival_s: float
    slot: int  # row in the request columns of the view
    state: State = State.WAITING
    worker: int | None = None  # the owner, while there is one
    epoch: int | None = None  # of the owner's assignment
    offer: KvOffer | None = None  # while RESERVING or SENDING
    log: Log = field(default_factory=TokenLog)
    queued_tokens: int = 0  # that the owner had to prefill when assigned; 0 once it decodes
    num_placed: int = 0  # output tokens in the log when the owner was assigned
    moved_from: int | None = None  # source of a recompute migration, until the first token after it
    plan: Plan | None = None  # of the current migration
    planned_s: float = 0.0  # when it was decided
    completed_plan: Plan | None = None  # of the last transfer, until the first token after it
    last_token_s: float | None = None  # time of the last report with a token of this request
    transfer_failed: bool = False  # a transfer from this owner: the next migration recomputes
    num_deaths: int = 0  # owners in a row that were lost before they reported a new token
    forecast: Forecast | None = None  # until the first token, or the first return to the queue
    placed_s: float | None = None  # when it was placed first
    transitions: deque[str] = field(default_factory=lambda: deque(maxlen=40))  # for error messages

    @property
    def num_tokens(self) -> int:
        """Prompt + output."""
        return len(self.request.prompt) + len(self.log.tokens)

    @property
    def deadline_at_s(self) -> float | None:
        """When its answer must be complete, on the scheduler's clock; None: at no time."""
        limit_s = self.request.deadline_s
        return None if limit_s is None else self.arrival_s + limit_s

    @property
    def owner(self) -> tuple[int, int]:
        """(worker, epoch) of the assignment. AssertionError if there is none."""
        assert self.worker is not None and self.epoch is not None, f"{self.request.id} has no owner"
        return self.worker, self.epoch

    @property
    def awaits_prompt_logprobs(self) -> bool:
        """True if logprobs of the prompt are to come, with the first token."""
        return self.request.sampling.num_prompt_logprobs is not None and not self.log.tokens

    @property
    def has_progressed(self) -> bool:
        """True if the log has grown since the owner was assigned."""
        return len(self.log.tokens) > self.num_placed

    def owner_died(self) -> str | None:
        """Count the loss of its owner; return why the request must not be placed again, or None."""
        self.num_deaths = 0 if self.has_progressed else self.num_deaths + 1
        if self.num_deaths < MAX_OWNER_DEATHS:
            return None
        return f"{MAX_OWNER_DEATHS} workers in a row died before its next token"

    def move(self, to: State, why: str) -> None:
        """Change state. RuntimeError if `ALLOWED` does not have the transition."""
        self.transitions.append(f"{self.state.value} -> {to.value}: {why}")
        if to not in ALLOWED[self.state]:
            raise self.bug(f"{self.state.value} -> {to.value} is not allowed")
        self.state = to

    def bug(self, what: str) -> RuntimeError:
        """Return an error about this request, with its last transitions."""
        return RuntimeError(
            f"request {self.request.id}, {self.state.value}, epoch {self.epoch}, "
            f"offer {self.offer}: {what}\n  " + "\n  ".join(self.transitions)
        )


def aligned(logprobs: tuple[TokenLogprob, ...], run: int, new: int) -> tuple[TokenLogprob, ...]:
    """The logprobs of the last `new` of `run` tokens; empty if there are no logprobs."""
    return logprobs[run - new :] if logprobs else ()
