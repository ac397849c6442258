"""How many prompt tokens a step computes, so that it takes a given time. Pure.

A step's seconds are a + b·prefilled + c·decoded + d·attended (`step_times`). What is left of the
target beside the decodes goes to prompts. Chunked prefill with a token budget is Sarathi-Serve's
(OSDI 2024, §4); here the budget is a time, since a token takes 1 ms on one CPU and 10 on another.
"""

import math
from dataclasses import dataclass

LEAST_TARGET_S = 0.05
MULTIPLE = 2.0  # of a step that only decodes
WITHOUT_DECODES = 4.0  # targets: no sequence waits for its next token, only messages do
LEAST_SHARE = 0.2  # of a step that also decodes, for prompts: they never starve
CLOSING_SHARE = 1 / 3  # likewise, at most, while a moving request is about to stop or to resume

StepSeconds = tuple[float, float, float, float]  # a, b, c, d
UNKNOWN: StepSeconds = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class StepBudget:
    """The limits of one worker's steps."""

    max_tokens: int  # prompt and output tokens together
    target_s: float | None = None  # None: twice a step that only decodes, at least 50 ms

    def prompt_s(
        self, seconds: StepSeconds, num_decoding: int, num_prompts: int = 1, closing: bool = False
    ) -> float:
        """Time for prompts in a step that decodes so many sequences; inf where nothing is known.

        num_prompts  that have yet to be computed. Where there are more of them than sequences that
                     decode, these wait as many times as long: fewer wait for fewer steps
        closing      a moving request is about to stop or to resume: the step is kept short
        """
        step_s, prefill_s, decode_s, _ = seconds
        if prefill_s <= 0:
            return math.inf
        decode_only_s = step_s + num_decoding * decode_s
        target_s = self.target_s or max(LEAST_TARGET_S, MULTIPLE * decode_only_s)
        if not num_decoding:
            return max(WITHOUT_DECODES * target_s - step_s, step_s)
        prompts_s = max(_share_s(LEAST_SHARE, decode_only_s), target_s - decode_only_s)
        prompts_s *= max(1.0, num_prompts / num_decoding)
        return min(prompts_s, _share_s(CLOSING_SHARE, decode_only_s)) if closing else prompts_s

    def num_tokens(self, seconds: StepSeconds, start: int, left_s: float) -> int:
        """Positions from `start` on that can be computed in `left_s`, at least one."""
        _, prefill_s, _, attended_s = seconds
        if left_s == math.inf:
            return self.max_tokens
        first_s = prefill_s + attended_s * start  # each later one looks back on one more
        if attended_s * left_s < 1e-6 * first_s * first_s:
            count = left_s / first_s
        else:
            count = (math.sqrt(first_s**2 + 2 * attended_s * left_s) - first_s) / attended_s
        return max(1, min(self.max_tokens, int(count + 1e-9)))

    def chunk(self, seconds: StepSeconds, start: int, num_decoding: int) -> int:
        """Positions of one prompt, from `start` on, in a step that decodes so many sequences."""
        left_s = self.prompt_s(seconds, num_decoding)
        most = max(1, self.max_tokens - num_decoding)
        return min(most, self.num_tokens(seconds, start, left_s))


def _share_s(share: float, rest_s: float) -> float:
    """What is this share of a step, where all else takes `rest_s`."""
    return rest_s * share / (1 - share)


def chunk_s(seconds: StepSeconds, start: int, num_tokens: int) -> float:
    """Seconds that positions [start, start + num_tokens) of a prompt add to a step."""
    _, prefill_s, _, attended_s = seconds
    return num_tokens * (prefill_s + attended_s * (start + num_tokens / 2))
