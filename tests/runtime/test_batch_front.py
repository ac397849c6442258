import itertools
from types import SimpleNamespace

from mellmpi.protocol import Cancel, Emit, Rejected, Submit
from mellmpi.runtime.batch_front import DRAWN_A_TURN, OPEN_REQUESTS, BatchFront, poisson
from tests.runtime.cell import request


class Job:
    """A batch of `count` requests that notes what it is told."""

    def __init__(self, count, unwanted=()):
        self._requests = [request(i, 1, 1) for i in range(count)]
        self.unwanted, self.told = tuple(unwanted), []
        self.counts = SimpleNamespace()

    exhausted = property(lambda self: not self._requests)
    done = property(lambda self: self.exhausted)

    def requests(self):
        while self._requests:
            yield self._requests.pop(0)

    def emit(self, command):
        self.told.append(command)
        return self.unwanted

    rejected = emit


def test_all_at_once_means_a_bounded_number_in_each_turn():
    front = BatchFront(Job(DRAWN_A_TURN + 5), None)
    assert len(front.inbox(0.0)) == DRAWN_A_TURN and front.due_s(0.0) == 0.0
    assert len(front.inbox(0.0)) == 5 and front.due_s(0.0) > 1.0


def test_requests_arrive_when_they_are_due():
    front = BatchFront(Job(3), iter([0.0, 1.0, 2.0, 3.0]))
    assert len(front.inbox(10.0)) == 1
    assert front.inbox(10.5) == [] and 0.4 < front.due_s(10.5) < 0.6
    assert len(front.inbox(12.0)) == 2 and front.done


def test_a_replay_holds_no_arrival_back():
    many = OPEN_REQUESTS + 1
    front = BatchFront(Job(many), itertools.repeat(0.0), max_open=float("inf"))
    assert sum(len(front.inbox(0.0)) for _ in range(many)) == many
    held = BatchFront(Job(many), itertools.repeat(0.0))
    assert sum(len(held.inbox(0.0)) for _ in range(many)) == OPEN_REQUESTS


def test_the_next_arrival_is_waited_for_exactly():
    front = BatchFront(Job(2), iter([0.0, 1.0, 2.0]))
    front.inbox(5.0)
    assert front.due_s(5.999) < 0.002


def test_poisson_arrivals_are_seeded_and_have_the_rate():
    times = list(itertools.islice(poisson(20.0, seed=1), 4000))
    assert times == list(itertools.islice(poisson(20.0, seed=1), 4000))
    assert times == sorted(times) and 180 < times[-1] < 220


def test_what_a_stop_string_ended_is_cancelled_as_complete():
    front = BatchFront(Job(2, unwanted=[1]), None)
    front.inbox(0.0)
    front.deliver(Emit(1, 0, (5,), (), None))
    assert not front.done and front.due_s(0.0) == 0.0
    assert front.inbox(0.0) == [Cancel(1, "stop")] and front.done


def test_the_other_choices_of_a_rejected_request_are_given_up():
    front = BatchFront(Job(3, unwanted=[2]), None)
    assert [type(event) for event in front.inbox(0.0)] == [Submit] * 3
    front.deliver(Rejected(1, "too long"))
    assert front.inbox(0.0) == [Cancel(2, "gone")]
