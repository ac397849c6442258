"""Chooses the number and the rate of the demo's requests to suit the machine.

About CONCURRENT requests per worker are open at a time: together more than the KV cache of one
worker holds, so that requests migrate, but few enough for answers at reading speed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mellmpi.costs import StepSeconds

CONCURRENT = 5  # open requests per worker
LOAD_S = 18.0  # duration of the arrivals
LONGEST_S = 45.0  # estimated time from the first arrival to the last answer
PROMPT_TOKENS, ANSWER_TOKENS = 160, 130  # mean of a request
LEAST_REQUESTS = 8  # a shorter demo shows no migrations
FASTEST = 8.0  # requests per second that people can follow


@dataclass(frozen=True)
class DemoLoad:
    """The load of a demo."""

    count: int  # requests
    rate: float  # requests per second, Poisson


def demo_load(workers: Sequence[StepSeconds], num_prompts: int) -> DemoLoad:
    """Return the load for workers with these step times. All workers get the same share."""
    answer_s = max(map(_answer_s, workers))
    rate = min(FASTEST, CONCURRENT * len(workers) / answer_s)
    fits = rate * max(0.0, LONGEST_S - answer_s)  # the last request is answered in time
    count = round(min(rate * LOAD_S, fits))
    return DemoLoad(min(num_prompts, max(LEAST_REQUESTS, count)), rate)


def _answer_s(seconds: StepSeconds) -> float:
    """Return the seconds of a mean request beside CONCURRENT - 1 others: prefill, then decode."""
    step_s, prefill_s, decode_s, _ = seconds
    prompt_s = PROMPT_TOKENS * prefill_s  # during an answer each other request prefills once, too
    return ANSWER_TOKENS * (step_s + CONCURRENT * decode_s) + CONCURRENT * prompt_s
