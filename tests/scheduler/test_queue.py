"""The queue: first in, first out; preempted requests go to the head."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mellmpi.scheduler.queue import WaitingQueue
from mellmpi.scheduler.requests import Record
from tests.scheduler.stage import request


def record(request_id):
    return Record(request(request_id), arrival_s=0.0, slot=0)


def test_removing_an_absent_request_changes_nothing():
    queue = WaitingQueue()
    queue.append(record(1), 10, now=0.0)
    queue.remove(record(2))
    assert len(queue) == 1 and queue.kv_bytes == 10


class QueueHistory(RuleBasedStateMachine):
    """The queue against a plain list as its model."""

    def __init__(self):
        super().__init__()
        self.queue, self.model, self.next_id = WaitingQueue(), [], 0
        self.now = 0.0

    def _new(self):
        self.next_id += 1
        self.now += 1.0
        return record(self.next_id)

    @rule(size=st.integers(0, 9))
    def append(self, size):
        new = self._new()
        self.model.append((new, size, self.now))
        self.queue.append(new, size, self.now)

    @rule(size=st.integers(0, 9))
    def prepend(self, size):
        new = self._new()
        self.model.insert(0, (new, size, min([self.now, *(since for *_, since in self.model)])))
        self.queue.prepend(new, size, self.now)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data):
        removed, *_ = self.model.pop(data.draw(st.integers(0, len(self.model) - 1)))
        self.queue.remove(removed)

    @invariant()
    def they_agree(self):
        assert len(self.queue) == len(self.model) and bool(self.queue) == bool(self.model)
        assert self.queue.kv_bytes == sum(size for _, size, _ in self.model)
        if self.model:
            head, _, since_s = self.model[0]
            assert self.queue.head() is head and self.queue.heads() == [head]
            assert self.queue.waiting_since_s("m") == since_s


TestQueueHistory = QueueHistory.TestCase
TestQueueHistory.settings = settings(max_examples=40)
