"""Prompt tokens to compute in a step, so that the step takes a target time.

A step takes a + b·prefilled + c·decoded + d·attended seconds (see `step_times`). Prompts get the
time that decoding leaves of the target. Chunked prefill with a token budget is from Sarathi-Serve
(OSDI 2024, section 4); the budget here is a time, since a token takes 1 ms on one CPU and 10 ms
on another.
"""

import math
from dataclasses import dataclass

LEAST_TARGET_S = 0.05
MULTIPLE = 2.0  # default target, in steps that only decode
WITHOUT_DECODES = 4.0  # targets: without decodes only messages wait for the step's end
LEAST_SHARE = 0.2  # least share of prompts in a step with decodes, so that prompts never starve
CLOSING_SHARE = 1 / 3  # largest share of prompts while a moving request is to stop or to resume

StepSeconds = tuple[float, float, float, float]  # a, b, c, d
UNKNOWN: StepSeconds = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class StepBudget:
    """The limits of one worker's steps."""

    max_tokens: int  # prompt and output tokens together
    target_s: float | None = None  # None: twice a step that only decodes, at least 50 ms

    def follows_decodes(self, seconds: StepSeconds) -> bool:
        """Whether the limit is a multiple of a decode-only step."""
        return self.target_s is None and seconds[1] > 0

    def prompt_s(
        self, seconds: StepSeconds, num_decoding: int, num_prompts: int = 1, closing: bool = False
    ) -> float:
        """Seconds for prompts in a step; inf if the step times are unknown.

        num_decoding  sequences that decode in the step
        num_prompts   prompts still to be computed; where they outnumber the decoding sequences,
                      the time grows by that ratio
        closing       a moving request is about to stop or to resume: keep the step short
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
        """Positions of a prompt, from `start` on, that `left_s` seconds allow; at least one."""
        _, prefill_s, _, attended_s = seconds
        if left_s == math.inf:
            return self.max_tokens
        first_s = prefill_s + attended_s * start  # each later position attends to one more
        if attended_s * left_s < 1e-6 * first_s * first_s:
            count = left_s / first_s
        else:
            count = (math.sqrt(first_s**2 + 2 * attended_s * left_s) - first_s) / attended_s
        return max(1, min(self.max_tokens, int(count + 1e-9)))

    def chunk(self, seconds: StepSeconds, start: int, num_decoding: int) -> int:
        """Positions of one prompt, from `start` on, in a step with `num_decoding` sequences."""
        left_s = self.prompt_s(seconds, num_decoding)
        most = max(1, self.max_tokens - num_decoding)
        return min(most, self.num_tokens(seconds, start, left_s))


def _share_s(share: float, rest_s: float) -> float:
    """Seconds that make up `share` of a step whose other work takes `rest_s`."""
    return rest_s * share / (1 - share)


def chunk_s(seconds: StepSeconds, start: int, num_tokens: int) -> float:
    """Seconds that positions [start, start + num_tokens) of a prompt add to a step."""
    _, prefill_s, _, attended_s = seconds
    return num_tokens * (prefill_s + attended_s * (start + num_tokens / 2))
