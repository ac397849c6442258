"""A waiting request wakes a worker only if no equal room is expected before it is awake."""

from dataclasses import replace

import pytest

from mellmpi.costs import CostModel
from mellmpi.protocol import FRONT, Parked, Submit, Wake
from mellmpi.scheduler.view import ParkWorker
from tests.scheduler.stage import Stage, request, to_workers

WAKE_S = 1.0


@pytest.fixture
def stage():
    """Worker 1 holds 150 bytes, all of which end within a second; 2 and 3 are parked."""
    stage = Stage()
    for worker in (2, 3):
        stage.tick(ParkWorker(worker))
        stage.handle(worker, Parked(acked=1))
    stage.running(num_prompt=60)
    stage.place_at = None
    predict(stage)
    return stage


def predict(stage, token_rate=10.0, growth_Bps=0.0, wake_s=WAKE_S):
    """Set the rates from which room is predicted; outputs have 10 tokens."""
    view = stage.scheduler.registry.view
    view.token_rate, view.answer_tokens = token_rate, 10.0
    view.growth_Bps[1], view.cost = growth_Bps, replace(view.cost, wake_s=wake_s)


def submit(stage, request_id=1, num_prompt=60):
    """Submit a request, of 150 bytes by default; return the workers that are woken for it."""
    return woken(stage.handle(FRONT, Submit(request(request_id, num_prompt=num_prompt))))


def woken(commands):
    return [worker for worker, command in to_workers(commands) if isinstance(command, Wake)]


def test_no_worker_is_woken_while_finishing_requests_free_enough(stage):
    assert submit(stage) == []


def test_a_request_larger_than_the_expected_room_wakes_a_worker(stage):
    assert submit(stage, num_prompt=61) == [2]


def test_a_second_request_may_exceed_the_expected_room(stage):
    assert submit(stage) == [] and submit(stage, 2, num_prompt=1) == [2]


def test_half_of_the_requests_finish_in_the_time_of_half_an_answer(stage):
    predict(stage, token_rate=5.0)
    assert submit(stage, num_prompt=28) == []  # 70 bytes of 75
    assert submit(stage, 2, num_prompt=4) == [2]


def test_growth_of_the_remaining_requests_is_subtracted(stage):
    predict(stage, token_rate=5.0, growth_Bps=12.0)  # half of it stays: 75 - 6
    assert submit(stage, num_prompt=28) == [2]


def test_if_all_requests_finish_before_the_wake_growth_does_not_count(stage):
    predict(stage, token_rate=1000.0, growth_Bps=100.0)
    assert submit(stage) == []


def test_arenas_of_waking_workers_count_as_expected_room(stage):
    assert submit(stage, num_prompt=61) == [2]
    assert submit(stage, 2, num_prompt=60) == []
    assert submit(stage, 3, num_prompt=16) == []  # 160 + 150 + 40 wait; 200 are waking, 150 finish
    assert submit(stage, 4, num_prompt=1) == [3]


def test_room_on_a_worker_of_another_model_does_not_count(stage):
    stage.scheduler.registry.ledger._able["m"][1] = False
    assert submit(stage) == [2]


def test_if_waking_takes_no_time_a_worker_is_woken_at_once(stage):
    predict(stage, wake_s=0.0)
    assert submit(stage, num_prompt=1) == [2]


def test_a_request_that_has_waited_for_the_time_of_a_wake_wakes_a_worker(stage):
    submit(stage)
    stage.now += 0.9 * WAKE_S
    assert woken(stage.room()) == []
    stage.now += 0.1 * WAKE_S
    assert woken(stage.room()) == [2]


def test_a_tick_without_events_wakes_a_worker_for_it(stage):
    submit(stage)
    assert woken(stage.tick()) == [2]


def test_the_time_of_a_wake_is_learnt_from_starts():
    stage = Stage(num_workers=8)
    for _ in range(3):
        for worker in range(1, 9):
            stage.ready(worker)  # in half a second
    assert stage.scheduler.registry.view.cost.wake_s == pytest.approx(0.5, rel=0.01)
    assert CostModel(wake_s=2.0).after_wake(1.0).wake_s == pytest.approx(1.7)


def test_the_first_wake_replaces_the_times_of_starts(stage):
    for worker in (2, 3):
        submit(stage, request_id=worker)
        stage.tick()
        stage.ready(worker)  # in half a second
    assert stage.scheduler.registry.view.cost.wake_s == pytest.approx(0.5)
