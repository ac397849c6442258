"""One request as rank 0 sees it: its state, who owns it, and the log of its tokens."""

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
    RESERVING = "reserving"  # running; a destination was asked for blocks
    SENDING = "sending"  # the source was told to send; the destination answers when it is in place


DEATHS = 3  # of workers in a row, without a token between them: then the request is the cause

ALLOWED = {
    State.WAITING: {State.RUNNING},
    State.RUNNING: {State.RESERVING, State.WAITING},
    State.RESERVING: {State.SENDING, State.RUNNING, State.WAITING},
    State.SENDING: {State.RUNNING, State.WAITING},
}


@dataclass(slots=True)
class KvOffer:
    """A move under way: where to, and the epoch that begins if it succeeds."""

    dst: int
    epoch: int
    start: int  # positions before it are recomputed by the destination


class Log(Protocol):
    """The output tokens of one request, in order. KV is only a cache of this."""

    @property
    def tokens(self) -> Sequence[int]: ...

    def merge(self, first: int, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Append the part of a run that is new, and return it. Idempotent; a gap is a bug."""
        ...


@dataclass(slots=True)
class TokenLog:
    """All output tokens rank 0 has heard of, in order."""

    tokens: list[int] = field(default_factory=list)

    def merge(self, first: int, tokens: tuple[int, ...]) -> tuple[int, ...]:
        known = len(self.tokens) - first
        assert known >= 0, f"gap: have {len(self.tokens)}, run starts at {first}"
        new = tokens[known:] if known else tokens  # by far the most frequent: none is known yet
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
    queued: int = 0  # tokens that its owner had yet to compute when it took it; 0: it has decoded
    num_placed: int = 0  # output tokens in the log when the owner took it
    moved_from: int | None = None  # recompute migration: until the first token from the new owner
    plan: Plan | None = None  # of the move under way, of whatever mode
    planned_s: float = 0.0  # when it was decided
    landed: Plan | None = None  # of the move by which its KV came: until the first token from here
    told_s: float | None = None  # when its owner last reported a token of it
    transfer_failed: bool = False  # under this owner: next time it is recomputed
    num_deaths: int = 0  # of owners in a row that died before a new token came
    story: deque[str] = field(default_factory=lambda: deque(maxlen=40))  # for people

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt) + len(self.log.tokens)

    @property
    def owner(self) -> tuple[int, int]:
        """(worker, epoch) of the assignment; ask only while there is one."""
        assert self.worker is not None and self.epoch is not None, f"{self.request.id} has no owner"
        return self.worker, self.epoch

    @property
    def settled(self) -> bool:
        """The log has grown since the owner took it."""
        return len(self.log.tokens) > self.num_placed

    def owner_died(self) -> str | None:
        """Why the request shall not be tried on another worker, or None."""
        self.num_deaths = 0 if self.settled else self.num_deaths + 1
        if self.num_deaths < DEATHS:
            return None
        return f"{DEATHS} workers in a row died before its next token"

    def move(self, to: State, why: str) -> None:
        """Change state; a transition the table does not have raises with the whole story."""
        self.story.append(f"{self.state.value} -> {to.value}: {why}")
        if to not in ALLOWED[self.state]:
            raise self.bug(f"{self.state.value} -> {to.value} is not allowed")
        self.state = to

    def bug(self, what: str) -> RuntimeError:
        """An error about this request that tells all that happened to it."""
        return RuntimeError(
            f"request {self.request.id}, {self.state.value}, epoch {self.epoch}, "
            f"offer {self.offer}: {what}\n  " + "\n  ".join(self.story)
        )


def aligned(tokens: tuple[TokenLogprob, ...], run: int, new: int) -> tuple[TokenLogprob, ...]:
    """The logprobs that belong to the last `new` of a run of `run` tokens; empty stays empty."""
    return tokens[run - new :] if tokens else ()
