"""The ledger: free bytes in the last report, less those of unacknowledged commands."""

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from mellmpi.protocol import ModelKv
from mellmpi.scheduler import Ledger, WorkerState

A, B = ModelKv("a", 16, 100), ModelKv("b", 16, 300)


@pytest.fixture
def ledger():
    ledger = Ledger(3)
    ledger.ready(1, (A, B), 1000, 8, acked=0)
    ledger.ready(2, (A,), 500, 4, acked=0)
    return ledger


def test_a_ready_worker_has_its_whole_arena_free(ledger):
    assert ledger.budget.tolist() == [0, 1000, 500, 0] == ledger.capacity.tolist()
    assert ledger.max_requests.tolist() == [0, 8, 4, 0]
    assert ledger.block_bytes.tolist() == [0, 300, 100, 0]
    assert ledger.workers(WorkerState.ACTIVE) == [1, 2]
    assert ledger.workers(WorkerState.STARTING) == [3]  # row 0, the scheduler, is never listed


def test_bytes_of_a_command_count_as_used_until_a_report_acknowledges_it(ledger):
    ledger.order(1, 100)
    ledger.order(1, 0)
    ledger.order(1, 200)
    assert ledger.budget[1] == 700
    ledger.report(1, acked=2, free_bytes=900)
    assert ledger.budget[1] == 700 and ledger.ordered[1] == 200
    ledger.report(1, acked=3, free_bytes=650)
    assert ledger.budget[1] == 650 and ledger.ordered[1] == 0


def test_commands_are_counted_by_worker(ledger):
    ledger.order(1, 100)
    assert ledger.budget.tolist() == [0, 900, 500, 0]
    with pytest.raises(AssertionError, match="never sent"):
        ledger.report(2, acked=1, free_bytes=0)


@pytest.mark.parametrize("state", [WorkerState.PARKED, WorkerState.LOST])
def test_a_parked_or_lost_worker_has_no_free_and_no_ordered_bytes(ledger, state):
    ledger.order(1, 100)
    ledger.drop_arena(1, state)
    assert ledger.budget[1] == 0 and ledger.ordered[1] == 0 and ledger.capacity[1] == 1000
    ledger.ready(1, (A,), 1000, 8, acked=1)
    assert ledger.budget[1] == 1000


def test_able_holds_in_any_state_and_hosting_only_while_active(ledger):
    assert ledger.able("a").tolist() == ledger.hosting("a").tolist() == [False, True, True, False]
    assert ledger.able("b").tolist() == [False, True, False, False]
    assert not ledger.able("c").any() and not ledger.hosting("c").any()
    ledger.enter(1, WorkerState.DRAINING)
    assert ledger.hosting("a").tolist() == [False, False, True, False]
    assert ledger.able("a").tolist() == [False, True, True, False]


def test_a_worker_is_empty_since_its_last_request_left(ledger):
    ledger.add(1)
    ledger.add(1)
    ledger.remove(1, now=5.0)
    assert ledger.num_requests[1] == 1 and ledger.empty_since_s[1] == 0.0
    ledger.remove(1, now=6.0)
    assert ledger.num_requests[1] == 0 and ledger.empty_since_s[1] == 6.0


class LedgerHistory(RuleBasedStateMachine):
    """A worker handles commands in order; its reports arrive with delay."""

    def __init__(self):
        super().__init__()
        self.ledger = Ledger(1)
        self.ledger.ready(1, (A,), 10_000, 8, acked=0)
        self.free, self.handled = 10_000, 0
        self.orders, self.reports = deque(), deque()
        self.unacked = deque()  # (command number, bytes)

    @rule(num_bytes=st.integers(0, 50))
    def order(self, num_bytes):
        self.ledger.order(1, num_bytes)
        self.orders.append(num_bytes)
        self.unacked.append((self.handled + len(self.orders), num_bytes))

    @precondition(lambda self: self.orders)
    @rule()
    def work(self):
        self.free -= self.orders.popleft()
        self.handled += 1

    @rule()
    def report(self):
        self.reports.append((self.handled, self.free))

    @precondition(lambda self: self.reports)
    @rule()
    def deliver(self):
        acked, free = self.reports.popleft()
        self.ledger.report(1, acked, free)
        while self.unacked and self.unacked[0][0] <= acked:
            self.unacked.popleft()
        assert self.ledger.budget[1] == free - sum(size for _, size in self.unacked)

    def teardown(self):
        while self.orders:
            self.work()
        self.report()
        while self.reports:
            self.deliver()
        assert self.ledger.budget[1] == self.free and self.ledger.ordered[1] == 0


TestLedgerHistory = LedgerHistory.TestCase
TestLedgerHistory.settings = settings(max_examples=40, stateful_step_count=40)
