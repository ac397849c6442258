"""A request's live state on one worker."""

from dataclasses import dataclass, field
from enum import Enum

from mellmpi.protocol import ROUNDS, Request, TokenLogprob
from mellmpi.worker.kvcache import BlockKey


class Phase(Enum):
    RUNNING = "running"  # gets a chunk in every step
    ARRIVING = "arriving"  # blocks reserved; KV on its way, or being computed
    FROZEN = "frozen"  # the last round is sent or being sent; kept until the scheduler has heard


@dataclass(slots=True)
class Stream:
    """A sequence on its way out, in rounds."""

    dst: int
    dst_epoch: int
    next_block: int  # all before it are sent, being sent, or not needed there
    round: int = 0
    num_before: float = float("inf")  # blocks of the round before
    awaits_part: bool = False  # the destination still computes its own part: do not stop yet

    @property
    def tag(self) -> int:
        """Of the blocks of this round."""
        return ROUNDS * self.dst_epoch + self.round


@dataclass(slots=True)
class Arrival:
    """A sequence on its way in."""

    src: int
    start: int  # positions before it are computed here, or were here
    next_block: int  # all before it are announced, or not sent
    num_computed: int | None = None  # at the source, when it stopped; None: it goes on
    announced: bool = False  # its first round, and that is being received
    told: bool = False  # the source, that all before `start` is here
    closing: bool = False  # its source is about to stop, or has stopped
    transfer_s: float = 0.0  # of the rounds that are in place


@dataclass(slots=True, eq=False)
class Sequence:
    """Known tokens, how many of them are computed, and the blocks that hold their KV.

    Prefill, decode, resumption and arrival are one rule: computed catches up with known.
    """

    request: Request
    epoch: int
    outputs: list[int]
    block_table: list[int]
    phase: Phase = Phase.RUNNING
    num_computed: int = 0  # positions whose KV is in place
    num_reported: int = 0  # outputs the scheduler has been told of
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by output index, if asked for
    keys: list[BlockKey] = field(default_factory=list)  # of the full blocks known so far
    num_known: int = 0  # leading blocks whose content the pool knows
    sending: set[int] = field(default_factory=set)  # tags of rounds that still read the blocks
    closing: set[int] = field(default_factory=set)  # of these, those that read a half-full one
    receiving: set[int] = field(default_factory=set)  # tags of rounds that still write them
    stream: Stream | None = None  # while it leaves
    arrival: Arrival | None = None  # while ARRIVING

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt) + len(self.outputs)

    @property
    def in_flight(self) -> bool:
        """A transfer still touches the blocks: they may not be given to anybody."""
        return bool(self.receiving or self.sending)

    @property
    def end(self) -> int:
        """Positions to compute here before anything else happens."""
        return self.num_tokens if self.arrival is None else self.arrival.start

    @property
    def computable(self) -> bool:
        """May the next step write its blocks, and is there something to write?"""
        if self.arrival is not None:
            # Not before its blocks are let in: during a long step nobody would do that.
            return self.arrival.announced and self.num_computed < self.arrival.start
        # Full blocks are only read; a half-full one that is being sent must stay as it is, even
        # if it will be thrown away.
        return self.phase is Phase.RUNNING and not self.closing

    def logprobs_from(self, first: int) -> tuple[TokenLogprob, ...]:
        """Of the outputs from index `first` on, one each; empty if none were asked for."""
        if not self.logprobs:
            return ()
        return tuple(self.logprobs[i] for i in range(first, len(self.outputs)))

    def token_range(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens of positions [start, end), prompt and outputs taken as one."""
        prompt = self.request.prompt
        n = len(prompt)
        if end <= n:
            return prompt[start:end]
        return prompt[start:] + tuple(self.outputs[max(0, start - n) : end - n])
