"""The state of a request on one worker."""

from dataclasses import dataclass, field
from enum import Enum

from mellmpi.protocol import ROUNDS, PromptLogprob, Request, Scoring, TokenLogprob
from mellmpi.worker.kvcache import BlockKey


class Phase(Enum):
    RUNNING = "running"  # gets a chunk in every step
    RECEIVING = "receiving"  # blocks reserved; KV in transfer, or being recomputed here
    FROZEN = "frozen"  # last round announced; blocks kept until the scheduler releases them


@dataclass(slots=True)
class OutgoingKv:
    """Transfer state of a sequence that this worker sends, in rounds."""

    dst: int
    dst_epoch: int
    next_block: int  # blocks before it are sent, in transfer, or not needed by the destination
    round: int = 0
    prior_blocks: float = float("inf")  # blocks of the previous round
    awaits_part: bool = False  # the destination still computes its own part: do not freeze yet

    @property
    def tag(self) -> int:
        """Tag of this round's block transfer."""
        return ROUNDS * self.dst_epoch + self.round


@dataclass(slots=True)
class IncomingKv:
    """Transfer state of a sequence that this worker receives."""

    src: int
    start: int  # positions before it are computed here, or were in the prefix cache
    next_block: int  # blocks before it are announced, or not sent
    num_computed: int | None = None  # at the source when it froze the sequence; None: not frozen
    announced: bool = False  # the first header has come
    src_notified: bool = False  # `PartComputed` has been sent
    src_stops_soon: bool = False  # the source is about to freeze the sequence, or has done so
    transfer_s: float = 0.0  # sum over completed rounds


@dataclass(slots=True, eq=False)
class Sequence:
    """Known tokens, the number of them that are computed, and the blocks that hold their KV.

    Prefill, decode, resumption and migration follow one rule: computed catches up with known.
    """

    request: Request
    epoch: int
    outputs: list[int]
    block_table: list[int]
    phase: Phase = Phase.RUNNING
    num_computed: int = 0  # positions whose KV is in place
    num_reported: int = 0  # outputs that the scheduler knows
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by output index, if asked for
    prompt_logprobs: list[PromptLogprob] | None = None  # to report with output 0; None: nothing
    keys: list[BlockKey] = field(default_factory=list)  # of the leading full blocks
    num_registered: int = 0  # leading blocks whose content the pool knows
    sending: set[int] = field(default_factory=set)  # tags of transfers that still read the blocks
    sending_partial: set[int] = field(default_factory=set)  # of these: read a half-full block
    receiving: set[int] = field(default_factory=set)  # tags of transfers that still write them
    outgoing: OutgoingKv | None = None  # during a migration from this worker
    incoming: IncomingKv | None = None  # while RECEIVING

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt) + len(self.outputs)

    @property
    def in_flight(self) -> bool:
        """Whether a transfer still reads or writes the blocks: they may not be freed."""
        return bool(self.receiving or self.sending)

    @property
    def compute_end(self) -> int:
        """Position up to which this worker computes KV now."""
        return self.num_tokens if self.incoming is None else self.incoming.start

    @property
    def computable(self) -> bool:
        """Whether the next step may compute positions of this sequence, and has any to compute."""
        if self.incoming is not None:
            # After the first header only: during a long step no receive could be posted.
            return self.incoming.announced and self.num_computed < self.incoming.start
        # Full blocks are only read. A half-full block in transfer must not be written, even if the
        # receiver will discard it.
        return self.phase is Phase.RUNNING and not self.sending_partial

    def logprobs_from(self, first: int) -> tuple[TokenLogprob, ...]:
        """Logprobs of the outputs from index `first` on; empty if none were asked for."""
        if not self.logprobs:
            return ()
        return tuple(self.logprobs[i] for i in range(first, len(self.outputs)))

    def scoring(self, start: int, end: int) -> Scoring | None:
        """Return the tokens of the prompt that follow positions [start, end), or None."""
        tokens = self.request.prompt[start + 1 : end + 1]
        return Scoring(tokens, self.request.sampling.num_prompt_logprobs or 0) if tokens else None

    def token_range(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens at positions [start, end) of prompt and outputs concatenated."""
        prompt = self.request.prompt
        n = len(prompt)
        if end <= n:
            return prompt[start:end]
        return prompt[start:] + tuple(self.outputs[max(0, start - n) : end - n])
