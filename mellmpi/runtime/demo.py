"""Chooses the number and the rate of the demo's requests to suit the machine.

About CONCURRENT requests per worker are open at a time: together more than the KV cache of one
worker holds, so that requests migrate, but few enough for answers at reading speed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mellmpi.costs import StepSeconds
from mellmpi.runtime.batch_front import poisson

CONCURRENT = 4  # open requests per worker
LOAD_S = 18.0  # duration of the arrivals
LONGEST_S = 45.0  # estimated time from the first arrival to the last answer
PROMPT_TOKENS, ANSWER_TOKENS = 160, 130  # mean of a request
BUSY_SHARE, CALM = 0.75, 4.0  # of the requests; times as far apart are the others
LEAST_REQUESTS = 8  # a shorter demo shows no migrations
FASTEST = 5.0  # requests per second that people can follow


@dataclass(frozen=True)
class DemoLoad:
    """The load of a demo."""

    count: int  # requests
    rate: float  # requests per second, Poisson; a quarter of it for the last requests


def demo_load(workers: Sequence[StepSeconds], num_prompts: int) -> DemoLoad:
    """Return the load for workers with these step times. All workers get the same share."""
    answer_s = max(map(_answer_s, workers))
    rate = min(FASTEST, CONCURRENT * len(workers) / answer_s)
    fits_s = max(0.0, LONGEST_S - answer_s)  # the last request is answered in time
    num_requests = round(rate * min(LOAD_S, fits_s) / (BUSY_SHARE + (1 - BUSY_SHARE) * CALM))
    return DemoLoad(min(num_prompts, max(LEAST_REQUESTS, num_requests)), rate)


def demo_arrivals(load: DemoLoad, seed: int) -> Iterator[float]:
    """Yield arrival times in seconds: at the end the load falls, and one worker can be emptied."""
    busy_until_s = 0.0
    for i, arrival_s in enumerate(poisson(load.rate, seed)):
        if i - 1 < BUSY_SHARE * load.count:
            busy_until_s = arrival_s
        yield busy_until_s + CALM * (arrival_s - busy_until_s)


def _answer_s(seconds: StepSeconds) -> float:
    """Return the seconds of a mean request beside CONCURRENT - 1 others: prefill, then decode."""
    step_s, prefill_s, decode_s, _ = seconds
    prompt_s = PROMPT_TOKENS * prefill_s  # during an answer each other request prefills once, too
    return ANSWER_TOKENS * (step_s + CONCURRENT * decode_s) + CONCURRENT * prompt_s
