"""A request's live state on one worker."""

from dataclasses import dataclass, field
from enum import Enum

from mellmpi.core.blocks import BlockKey
from mellmpi.protocol import Request, TokenLogprob


class Phase(Enum):
    RUNNING = "running"  # gets a chunk in every step
    ARRIVING = "arriving"  # blocks reserved; KV on its way
    FROZEN = "frozen"  # KV sent or being sent; kept until the scheduler has heard of it


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
    sends: int = 0  # transfers that still read the blocks
    receiving: bool = False  # a transfer still writes them
    src: int | None = None  # while ARRIVING: where from

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt) + len(self.outputs)

    @property
    def in_flight(self) -> bool:
        """A transfer still touches the blocks: they may not be given to anybody."""
        return self.receiving or self.sends > 0

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
