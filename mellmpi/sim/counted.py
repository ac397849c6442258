"""Sequences, steps and transfers of a simulated worker, in numbers."""

from dataclasses import dataclass

from mellmpi.core.blocks import blocks_for
from mellmpi.core.sequences import Phase
from mellmpi.protocol import ModelKv


@dataclass(slots=True, eq=False)
class FastSequence:
    """A request on one worker, in numbers."""

    request_id: int
    epoch: int
    kv: ModelKv
    num_prompt: int
    length: int  # of the whole answer
    outputs: int
    told: int  # outputs the scheduler has heard of
    phase: Phase = Phase.RUNNING
    computed: int = 0  # positions whose KV is in place
    blocks: int = 0  # held
    sends: int = 0  # transfers that read the blocks
    receiving: bool = False  # a transfer writes them

    @property
    def known(self) -> int:
        return self.num_prompt + self.outputs

    @property
    def in_flight(self) -> bool:
        return self.receiving or self.sends > 0

    def needed(self, num_tokens: int) -> int:
        return blocks_for(num_tokens, self.kv.block_size)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps that are alike: the same sequences, each `step_s` long."""

    chunks: tuple[tuple[FastSequence, int], ...]  # (sequence, positions a step)
    steps: int
    step_s: float
    prefill: int  # positions a step that are not sampled from
    decode: int  # sampled positions a step


@dataclass(frozen=True, slots=True)
class Sending:
    """KV on its way from one worker to another; both are told when it has arrived."""

    request_id: int
    epoch: int  # of the source's assignment
    dst: int
    dst_epoch: int
    outputs: int
    computed: int
    num_bytes: int  # on the link
    start: int  # positions before it are recomputed by the destination
