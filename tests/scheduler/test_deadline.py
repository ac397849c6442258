"""Deadlines and priorities of requests."""

import pytest

from mellmpi.protocol import FRONT, Assign, Emit, Rejected, Release, Submit
from tests.scheduler.stage import Stage, assert_nothing_left, of_type, report, request


@pytest.fixture
def stage():
    return Stage()


@pytest.mark.parametrize("reach", ["waiting", "running", "reserving", "sending"])
def test_a_request_ends_at_its_deadline_wherever_it_is(stage, reach):
    record = getattr(stage, reach)(deadline_s=20.0)
    worker = record.worker
    offer = record.offer
    stage.place_at = None
    while stage.now + 1.0 < record.arrival_s + 20.0:
        assert not of_type(stage.tick(), Rejected)
    commands = stage.tick()
    assert of_type(commands, Rejected) == [
        Rejected(7, "deadline: the answer is not complete after 20 s", 0.0)
    ]
    released = [to for to, command in commands if isinstance(command, Release)]
    assert released == [w for w in (worker, offer and offer.dst) if w]
    assert_nothing_left(stage.scheduler)


def test_tokens_before_the_deadline_stand_and_none_follow(stage):
    record = stage.running(deadline_s=2.5)
    epoch = record.epoch
    for _ in range(3):
        stage.tick()
    assert 7 not in stage.scheduler.records
    assert not of_type(stage.handle(1, report((7, epoch, 1, (6,)))), Emit)


def test_a_request_that_ends_in_time_is_not_refused_later(stage):
    record = stage.running(deadline_s=2.5, max_tokens=2)
    stage.handle(1, report((7, record.epoch, 1, (6,))))
    commands = [command for _ in range(4) for command in stage.tick()]
    assert not of_type(commands, Rejected)


def test_a_deadline_is_that_of_the_request_and_not_of_its_id(stage):
    first = stage.running(deadline_s=2.5, max_tokens=1, tokens=())
    stage.handle(1, report((7, first.epoch, 0, (6,))))
    stage.now += 1.0
    stage.waiting(deadline_s=9.0)
    stage.place_at = None
    for _ in range(3):
        stage.tick()
    assert 7 in stage.scheduler.records


def test_the_queue_goes_by_priority_then_by_arrival(stage):
    for request_id, priority in ((1, 5), (2, 0), (3, 5), (4, -3), (5, 0)):
        stage.waiting(request_id, priority=priority)
    order = [c.request.id for c in of_type(stage.room(), Assign)]
    assert order == [4, 2, 5, 1, 3]


def test_a_preempted_request_goes_to_the_head_of_its_own_priority(stage):
    record = stage.running(1, priority=5)
    for request_id, priority in ((2, 5), (3, 0)):
        stage.waiting(request_id, priority=priority)
    stage.place_at = None
    stage.handle(1, report(preempted=((1, record.epoch),)))
    stage.place_at = 1
    assert [c.request.id for c in of_type(stage.room(), Assign)] == [3, 1, 2]


def test_priorities_of_one_model_do_not_end_what_runs(stage):
    record = stage.running(1, priority=5)
    stage.place_at = None
    stage.handle(FRONT, Submit(request(2, priority=-5)))
    assert record.worker == 1
