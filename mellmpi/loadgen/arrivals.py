"""Arrival times of requests, on absolute times: a late request does not delay the next ones."""

import math

import numpy as np

from mellmpi.workload import gamma


def arrival_times(number: int, rate: float, burstiness: float, seed: int) -> np.ndarray:
    """Return the arrivals in seconds, float64 [number], ascending.

    rate        requests per second; inf: all arrive at 0
    burstiness  shape of the gamma distribution of the gaps; 1: Poisson arrivals, inf: equal gaps

    The times are scaled so that the last is number / rate, as in vLLM: the mean rate is the one
    asked for, whatever the seed.
    """
    if math.isinf(rate):
        return np.zeros(number)
    if math.isinf(burstiness):
        return np.arange(1, number + 1) / rate
    times = gamma(number, rate, burstiness**-0.5, 1, 1, seed).arrival_s
    return np.asarray(times * (number / rate / times[-1]))
