import itertools
from types import SimpleNamespace

from mellmpi.protocol import Cancel, Emit, Rejected, Submit
from mellmpi.runtime.batch_front import OPEN_REQUESTS, SUBMITS_PER_INBOX, BatchFront, poisson
from tests.runtime.cell import request


class Source:
    """A source of `count` requests that records the answers."""

    def __init__(self, count, unwanted=()):
        self._requests = [request(i, 1, 1) for i in range(count)]
        self.unwanted, self.events = tuple(unwanted), []
        self.counts = SimpleNamespace()

    exhausted = property(lambda self: not self._requests)
    done = property(lambda self: self.exhausted)

    def requests(self):
        while self._requests:
            yield self._requests.pop(0)

    def emit(self, command):
        self.events.append(command)
        return self.unwanted

    rejected = emit


def test_each_inbox_has_a_bounded_number_of_requests():
    front = BatchFront(Source(SUBMITS_PER_INBOX + 5), None)
    assert len(front.inbox(0.0)) == SUBMITS_PER_INBOX and front.due_s(0.0) == 0.0
    assert len(front.inbox(0.0)) == 5 and front.due_s(0.0) > 1.0


def test_requests_arrive_when_they_are_due():
    front = BatchFront(Source(3), iter([0.0, 1.0, 2.0, 3.0]))
    assert len(front.inbox(10.0)) == 1
    assert front.inbox(10.5) == [] and 0.4 < front.due_s(10.5) < 0.6
    assert len(front.inbox(12.0)) == 2 and front.done


def test_a_replay_does_not_limit_open_requests():
    many = OPEN_REQUESTS + 1
    front = BatchFront(Source(many), itertools.repeat(0.0), max_open=float("inf"))
    assert sum(len(front.inbox(0.0)) for _ in range(many)) == many
    held = BatchFront(Source(many), itertools.repeat(0.0))
    assert sum(len(held.inbox(0.0)) for _ in range(many)) == OPEN_REQUESTS


def test_due_s_is_the_time_to_the_next_arrival():
    front = BatchFront(Source(2), iter([0.0, 1.0, 2.0]))
    front.inbox(5.0)
    assert front.due_s(5.999) < 0.002


def test_poisson_arrivals_are_seeded_and_have_the_rate():
    times = list(itertools.islice(poisson(20.0, seed=1), 4000))
    assert times == list(itertools.islice(poisson(20.0, seed=1), 4000))
    assert times == sorted(times) and 180 < times[-1] < 220


def test_a_request_that_a_stop_string_ended_is_cancelled_as_complete():
    front = BatchFront(Source(2, unwanted=[1]), None)
    front.inbox(0.0)
    front.deliver(Emit(1, 0, (5,), (), None, ()))
    assert not front.done and front.due_s(0.0) == 0.0
    assert front.inbox(0.0) == [Cancel(1, "stop")] and front.done


def test_the_other_choices_of_a_rejected_request_are_cancelled():
    front = BatchFront(Source(3, unwanted=[2]), None)
    assert [type(event) for event in front.inbox(0.0)] == [Submit] * 3
    front.deliver(Rejected(1, "too long", 0.0))
    assert front.inbox(0.0) == [Cancel(2, "gone")]
