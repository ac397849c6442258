"""One worker of the idealised cluster: its sequences, and their KV as a linear function of time."""

from dataclasses import dataclass, field

from mellmpi.protocol import ModelKv


@dataclass(slots=True, eq=False)
class IdealSequence:
    """A sequence that gets one output token in every decode step."""

    request_id: int
    epoch: int
    num_prompt: int
    token_bytes: int  # KV of one position
    length: int  # tokens of the whole answer
    first: int  # output tokens at step `start`
    start: int
    receiving: bool = False  # reserved only; the source decodes it

    def outputs(self, step: int) -> int:
        """Number of output tokens at this step."""
        return self.first + step - self.start

    @property
    def end(self) -> int:
        """Step in which the last token is decoded."""
        return self.start + self.length - self.first


@dataclass(slots=True, eq=False)
class IdealWorker:
    """KV in use at step s is `fixed + growth * s` bytes until the next event."""

    id: int
    models: tuple[ModelKv, ...]
    capacity: int  # bytes
    sequences: dict[int, IdealSequence] = field(default_factory=dict)  # by epoch, oldest first
    ended: list[IdealSequence] = field(default_factory=list)  # since the last report
    preempted: list[tuple[IdealSequence, int]] = field(default_factory=list)  # with their outputs
    fixed: int = 0
    growth: int = 0
    acked: int = 0
    last_state: tuple[int, int] = (-1, -1)  # acked, free bytes in the last report
    version: int = 0  # of its entry in the heap of overflows

    def used(self, step: int) -> int:
        """Bytes in use at this step."""
        return self.fixed + self.growth * step

    def token_bytes(self, model: str) -> int:
        """KV bytes of one position."""
        return next(m.block_bytes for m in self.models if m.model == model)

    def add(self, sequence: IdealSequence) -> None:
        self.sequences[sequence.epoch] = sequence
        self._count(sequence, 1)

    def remove(self, epoch: int) -> IdealSequence:
        sequence = self.sequences.pop(epoch)
        self._count(sequence, -1)
        return sequence

    def _count(self, sequence: IdealSequence, sign: int) -> None:
        size, known = sequence.token_bytes, sequence.num_prompt + sequence.first
        self.fixed += sign * size * (known - sequence.start)
        self.growth += sign * size
