"""Tokens, preemptions and work of a worker since its last report to the scheduler."""

from itertools import chain

from mellmpi.protocol import PromptLogprob, StepReport, TokenLogprob
from mellmpi.worker.sequences import Sequence


class ReportBuffer:
    """Collects tokens, preemptions and work until the driver asks for a report."""

    def __init__(self) -> None:
        self._clear()
        self._last_state = (0, 0)  # acked, free bytes in the last report

    def _clear(self) -> None:
        self._runs: dict[int, Sequence] = {}  # with new tokens, by epoch; some have ended
        self._preempted: list[tuple[int, int]] = []
        self._cached: list[tuple[int, int]] = []
        self._prefill_tokens = self._decode_tokens = self._attended = 0

    def token(self, sequence: Sequence) -> None:
        """Record that the sequence has new output tokens."""
        self._runs[sequence.epoch] = sequence

    def decoded(self, sequence: Sequence, num_tokens: int) -> None:
        """Record output tokens and as many decoded positions."""
        self._runs[sequence.epoch] = sequence
        self._decode_tokens += num_tokens

    def placed(self, sequence: Sequence) -> None:
        """Record how much of a new request the prefix cache has."""
        self._cached.append((sequence.request.id, sequence.num_computed))

    def preempted(self, sequence: Sequence) -> None:
        self._preempted.append((sequence.request.id, sequence.epoch))

    def computed(self, start: int, num_positions: int, sampled: bool) -> None:
        """Record a chunk: positions from `start` on; if sampled, the last one was a decode."""
        prefilled = num_positions - sampled
        self._prefill_tokens += prefilled
        self._decode_tokens += sampled
        self._attended += prefilled * start + prefilled * (prefilled - 1) // 2

    def report(self, steps: int, step_s: float, free_bytes: int, acked: int) -> StepReport | None:
        """Return everything collected as one message and clear the buffer; None if no change."""
        if not (self._runs or self._preempted or self._cached) and self._last_state == (
            acked,
            free_bytes,
        ):
            return None
        runs = list(self._runs.values())
        new_tokens = [s.outputs[s.num_reported :] for s in runs]
        report = StepReport(
            steps=steps,
            step_s=step_s,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            free_bytes=free_bytes,
            acked=acked,
            request_ids=tuple(s.request.id for s in runs),
            epochs=tuple(s.epoch for s in runs),
            firsts=tuple(s.num_reported for s in runs),
            counts=tuple(map(len, new_tokens)),
            tokens=tuple(chain.from_iterable(new_tokens)),
            logprobs=_logprobs(runs),
            preempted=tuple(self._preempted),
            attended=self._attended,
            cached=tuple(self._cached),
            prompt_logprobs=_prompt_logprobs(runs),
        )
        for sequence in runs:
            sequence.num_reported = len(sequence.outputs)
            sequence.prompt_logprobs = None
        self._clear()
        self._last_state = (acked, free_bytes)
        return report


def _logprobs(runs: list[Sequence]) -> tuple[tuple[int, tuple[TokenLogprob, ...]], ...]:
    """(run index, logprobs of its tokens), for sequences that have logprobs."""
    return tuple((i, s.logprobs_from(s.num_reported)) for i, s in enumerate(runs) if s.logprobs)


def _prompt_logprobs(runs: list[Sequence]) -> tuple[tuple[int, tuple[PromptLogprob, ...]], ...]:
    """(run index, logprobs of its prompt), for sequences that have them: their first runs."""
    return tuple((i, tuple(s.prompt_logprobs)) for i, s in enumerate(runs) if s.prompt_logprobs)
