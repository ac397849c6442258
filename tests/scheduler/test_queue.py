"""The queue: by priority, then first in, first out; preempted requests go to the head of theirs."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mellmpi.scheduler.queue import WaitingQueue
from mellmpi.scheduler.requests import Record
from tests.scheduler.stage import request

PRIORITY = st.integers(-1, 2)


def record(request_id, priority=0):
    return Record(request(request_id, priority=priority), arrival_s=0.0, slot=0)


def test_removing_an_absent_request_changes_nothing():
    queue = WaitingQueue()
    queue.append(record(1), 10, now=0.0)
    queue.remove(record(2))
    assert len(queue) == 1 and queue.kv_bytes == 10


class QueueHistory(RuleBasedStateMachine):
    """The queue against a plain list of (record, size, since) as its model."""

    def __init__(self):
        super().__init__()
        self.queue, self.model, self.next_id = WaitingQueue(), [], 0
        self.now = 0.0

    def _new(self, priority):
        self.next_id += 1
        self.now += 1.0
        return record(self.next_id, priority)

    def _of(self, priority):
        return [entry for entry in self.model if entry[0].request.priority == priority]

    @rule(size=st.integers(0, 9), priority=PRIORITY)
    def append(self, size, priority):
        new = self._new(priority)
        self.model.append((new, size, self.now))
        self.queue.append(new, size, self.now)

    @rule(size=st.integers(0, 9), priority=PRIORITY)
    def prepend(self, size, priority):
        new = self._new(priority)
        passed_s = [since_s for *_, since_s in self._of(priority)]
        self.model.insert(0, (new, size, min([self.now, *passed_s])))
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
        assert self.queue.model_bytes("m") == self.queue.kv_bytes
        for priority in range(-2, 4):
            before = [size for r, size, _ in self.model if r.request.priority <= priority]
            assert self.queue.bytes_before("m", priority) == sum(before)
        if self.model:
            in_order = sorted(self.model, key=lambda entry: entry[0].request.priority)  # stable
            head = in_order[0][0]
            assert self.queue.head() is head and self.queue.heads() == [head]
            assert self.queue.waiting_since_s("m") == min(since_s for *_, since_s in self.model)


class PinnedHistory(RuleBasedStateMachine):
    """The queue of one worker: pinned requests resume by priority, the last preempted first."""

    def __init__(self):
        super().__init__()
        self.queue, self.model, self.next_id = WaitingQueue(), [], 0

    @rule(priority=PRIORITY)
    def pin(self, priority):
        self.next_id += 1
        self.model.insert(0, record(self.next_id, priority))
        self.queue.prepend(self.model[0], 1, 0.0, pinned_to=1)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data):
        self.queue.remove(self.model.pop(data.draw(st.integers(0, len(self.model) - 1))))

    @invariant()
    def they_agree(self):
        in_order = sorted(self.model, key=lambda r: r.request.priority)
        assert self.queue.pinned_to(1) == in_order and self.queue.head() is None
        assert self.queue.pinning_workers() == ([1] if self.model else [])

    def teardown(self):
        in_order = self.queue.pinned_to(1)
        assert self.queue.unpin(1) == in_order and not self.queue.pinned_to(1)
        for expected in in_order:
            assert self.queue.head() is expected
            self.queue.remove(expected)
        assert not self.queue and self.queue.kv_bytes == self.queue.model_bytes("m") == 0


TestQueueHistory = QueueHistory.TestCase
TestQueueHistory.settings = settings(max_examples=40)
TestPinnedHistory = PinnedHistory.TestCase
TestPinnedHistory.settings = settings(max_examples=20)
