import itertools

import pytest

from mellmpi.runtime.demo import (
    BUSY_SHARE,
    CALM,
    FASTEST,
    LEAST_REQUESTS,
    LONGEST_S,
    DemoLoad,
    _answer_s,
    demo_arrivals,
    demo_load,
)

FAST = (0.010, 1e-3, 1e-3, 0.0)  # a CPU with bfloat16 products
SLOW = (0.025, 4e-3, 4e-3, 0.0)  # a CPU with AVX2 only
GPU = (0.002, 1e-5, 1e-5, 0.0)
SNAIL = (0.5, 0.05, 0.1, 0.0)


@pytest.mark.parametrize("steps", [FAST, SLOW, GPU])
@pytest.mark.parametrize("num_workers", [1, 2, 8])
def test_a_demo_ends_in_time_and_has_enough_to_show(steps, num_workers):
    load = demo_load([steps] * num_workers, 56)
    assert LEAST_REQUESTS <= load.count <= 56 and load.rate <= FASTEST
    mean_s = load.count / load.rate * (BUSY_SHARE + (1 - BUSY_SHARE) * CALM)
    assert mean_s + _answer_s(steps) <= LONGEST_S + 1


def test_a_slower_machine_gets_fewer_requests_in_the_same_time():
    fast, slow = demo_load([FAST] * 2, 56), demo_load([SLOW] * 2, 56)
    assert slow.rate < fast.rate / 2 and slow.count < fast.count


def test_the_load_follows_the_slowest_worker():
    assert demo_load([FAST, SLOW], 56) == demo_load([SLOW, SLOW], 56)


def test_a_very_slow_machine_gets_the_shortest_demo():
    assert demo_load([SNAIL] * 2, 56).count == LEAST_REQUESTS


def test_at_the_end_of_a_demo_the_load_falls():
    times = list(itertools.islice(demo_arrivals(DemoLoad(4000, 10.0), seed=0), 4000))
    busy = int(BUSY_SHARE * 4000)
    assert times[busy] / busy == pytest.approx(0.1, rel=0.05)
    assert (times[-1] - times[busy]) / (4000 - busy) == pytest.approx(0.1 * CALM, rel=0.1)
