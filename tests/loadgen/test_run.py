"""Runs on virtual time: an event loop whose clock jumps to the next timer."""

import asyncio
import selectors

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mellmpi.loadgen.answers import Outcome
from mellmpi.loadgen.arrivals import arrival_times
from mellmpi.loadgen.datasets import Prompt
from mellmpi.loadgen.run import Generator

PROMPT = Prompt("a", 1, 1)


class JumpingSelector(selectors.SelectSelector):
    """Instead of waiting it moves the clock on."""

    now_s = 1000.0  # a clock begins anywhere

    def select(self, timeout=None):
        self.now_s += timeout or 0.0
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.jumping = JumpingSelector()
        super().__init__(self.jumping)

    def time(self):
        return self.jumping.now_s


class Server:
    """Answers after `takes_s`; sending blocks the generator for `blocks_s`."""

    def __init__(self, takes_s=0.0, blocks_s=0.0, loop=None):
        self.takes_s, self.blocks_s, self.loop = takes_s, blocks_s, loop
        self.sent_s, self.active, self.most = [], 0, 0

    async def ask(self, prompt, begin_s):
        self.sent_s.append(self.loop.time() - begin_s)
        self.loop.jumping.now_s += self.blocks_s
        self.active += 1
        self.most = max(self.most, self.active)
        try:
            await asyncio.sleep(self.takes_s)
        finally:
            self.active -= 1
        return Outcome(self.sent_s[-1], 1, self.takes_s)


def play(server, arrival_s, stop_s=None, **options):
    """A whole run on virtual time."""
    loop = server.loop = VirtualLoop()

    async def run():
        stop = asyncio.Event()
        if stop_s is not None:
            loop.call_later(stop_s, stop.set)
        generator = Generator(server.ask, clock=loop.time, **options)
        return await generator.run([PROMPT] * len(arrival_s), list(arrival_s), stop)

    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()


@given(st.lists(st.floats(0, 3), min_size=1, max_size=30).map(sorted))
def test_requests_are_sent_at_their_times(arrival_s):
    server = Server(takes_s=4.0)
    run = play(server, arrival_s)
    assert server.sent_s == pytest.approx(arrival_s)
    assert run.duration_s == pytest.approx(arrival_s[-1] + 4.0)
    assert len(run.outcomes) == run.sent == len(arrival_s) and run.in_flight == 0
    assert max(run.send_lag_s) < 1e-6 and not run.is_interrupted


def test_lateness_does_not_accumulate():
    server = Server(blocks_s=0.04)  # of 0.1 s between two requests
    run = play(server, np.arange(1, 51) * 0.1)
    assert server.sent_s == pytest.approx(np.arange(1, 51) * 0.1)
    server = Server(blocks_s=0.15)  # more than there is
    run = play(server, np.arange(1, 11) * 0.1)
    assert run.send_lag_s[:3] == pytest.approx([0.0, 0.05, 0.1])
    assert max(run.loop_lag_s) > 0.05


@given(st.integers(1, 5), st.integers(1, 20))
def test_no_more_requests_are_in_flight_than_allowed(most, number):
    server = Server(takes_s=2.0)
    run = play(server, [0.0] * number, max_concurrency=most)
    assert server.most == min(most, number) and len(run.outcomes) == number
    assert run.duration_s == pytest.approx(2.0 * -(-number // most))


def test_an_interrupt_ends_the_run_with_what_was_measured():
    server = Server(takes_s=1.5)
    run = play(server, [0.0, 1.0, 2.0, 3.0], stop_s=2.0001)
    assert run.is_interrupted and run.duration_s == pytest.approx(2.0001)
    assert len(run.outcomes) == 1 and run.sent == 3 and run.in_flight == 2
    assert server.active == 0


def test_an_error_of_the_generator_itself_is_raised():
    async def ask(prompt, begin_s):
        raise KeyError("bug")

    server = Server()
    server.ask = ask
    with pytest.raises(ExceptionGroup):
        play(server, [0.0])


def test_every_change_is_told():
    seen = []
    play(Server(), [0.0, 1.0], on_change=lambda run: seen.append((run.sent, len(run.outcomes))))
    assert seen == [(1, 0), (1, 1), (2, 1), (2, 2)]


@given(st.integers(1, 300), st.floats(0.1, 1000), st.floats(0.1, 10), st.integers(0, 5))
def test_the_last_request_arrives_when_the_rate_says(number, rate, burstiness, seed):
    times = arrival_times(number, rate, burstiness, seed)
    assert len(times) == number and times[-1] == pytest.approx(number / rate)
    assert (np.diff(times) >= 0).all() and times[0] >= 0
    assert (times == arrival_times(number, rate, burstiness, seed)).all()


def test_gaps_are_gamma_distributed():
    for burstiness in (0.25, 1.0, 4.0):
        gaps = np.diff(arrival_times(20_000, 10, burstiness, 0))
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    assert np.diff(arrival_times(5, 10, float("inf"), 0)) == pytest.approx([0.1] * 4)
    assert not arrival_times(5, float("inf"), 1.0, 0).any()
