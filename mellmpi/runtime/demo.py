"""How many of the demo's requests come, and how fast, so that the demo suits the machine.

About CONCURRENT requests a worker are open at once: more than the KV cache of one worker holds in
all, so that requests move, and few enough that each answer comes while somebody watches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mellmpi.costs import StepSeconds

CONCURRENT = 5  # open requests a worker
LOAD_S = 18.0  # requests arrive for so long
LONGEST_S = 45.0  # from the first arrival to the last answer, as estimated
PROMPT_TOKENS, ANSWER_TOKENS = 160, 130  # of a request, on average
LEAST_REQUESTS = 8  # shorter demos show nothing
FASTEST = 8.0  # requests a second; the demo is for people


@dataclass(frozen=True)
class DemoLoad:
    """Requests of a demo."""

    count: int
    rate: float  # requests a second, Poisson


def demo_load(workers: Sequence[StepSeconds], num_prompts: int) -> DemoLoad:
    """What suits workers whose steps take so long; all of them get the same share."""
    answer_s = max(map(_answer_s, workers))
    rate = min(FASTEST, CONCURRENT * len(workers) / answer_s)
    fits = rate * max(0.0, LONGEST_S - answer_s)  # the last one to arrive is answered in time
    count = round(min(rate * LOAD_S, fits))
    return DemoLoad(min(num_prompts, max(LEAST_REQUESTS, count)), rate)


def _answer_s(seconds: StepSeconds) -> float:
    """An average request beside CONCURRENT - 1 others: its prompt, then a token a step."""
    step_s, prefill_s, decode_s, _ = seconds
    prompts_s = PROMPT_TOKENS * prefill_s  # of others, too: one begins as often as one ends
    return ANSWER_TOKENS * (step_s + CONCURRENT * decode_s) + CONCURRENT * prompts_s
