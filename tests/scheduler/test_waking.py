"""When a waiting request is worth a wake: not while as much room comes sooner by itself."""

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
        stage.tell(worker, Parked(acked=1))
    stage.running(num_prompt=60)
    stage.place_at = None
    expect(stage)
    return stage


def expect(stage, token_rate=10.0, growth_Bps=0.0, wake_s=WAKE_S):
    """What is thought of the near future; answers have 10 tokens."""
    view = stage.scheduler.registry.view
    view.token_rate, view.answer_tokens = token_rate, 10.0
    view.growth_Bps[1], view.cost = growth_Bps, replace(view.cost, wake_s=wake_s)


def submit(stage, request_id=1, num_prompt=60):
    """60 tokens are 150 bytes. The workers that are woken for it."""
    return woken(stage.tell(FRONT, Submit(request(request_id, num_prompt=num_prompt))))


def woken(commands):
    return [worker for worker, command in to_workers(commands) if isinstance(command, Wake)]


def test_while_what_ends_covers_what_waits_nobody_is_woken(stage):
    assert submit(stage) == []


def test_what_waits_beyond_what_ends_wakes_a_worker(stage):
    assert submit(stage, num_prompt=61) == [2]


def test_a_second_one_may_be_more_than_what_ends(stage):
    assert submit(stage) == [] and submit(stage, 2, num_prompt=1) == [2]


def test_of_half_an_answer_half_has_ended(stage):
    expect(stage, token_rate=5.0)
    assert submit(stage, num_prompt=28) == []  # 70 bytes of 75
    assert submit(stage, 2, num_prompt=4) == [2]


def test_what_those_that_stay_grow_by_is_not_free(stage):
    expect(stage, token_rate=5.0, growth_Bps=12.0)  # half of it stays: 75 - 6
    assert submit(stage, num_prompt=28) == [2]


def test_where_all_end_within_the_wake_nothing_grows(stage):
    expect(stage, token_rate=1000.0, growth_Bps=100.0)
    assert submit(stage) == []


def test_what_is_coming_counts_with_what_ends(stage):
    assert submit(stage, num_prompt=61) == [2]
    assert submit(stage, 2, num_prompt=60) == []
    assert submit(stage, 3, num_prompt=16) == []  # 160 + 150 + 40 wait; 200 come and 150 end
    assert submit(stage, 4, num_prompt=1) == [3]


def test_what_a_worker_of_another_model_frees_is_no_room(stage):
    stage.scheduler.registry.ledger._able["m"][1] = False
    assert submit(stage) == [2]


def test_where_waking_costs_nothing_nobody_waits(stage):
    expect(stage, wake_s=0.0)
    assert submit(stage, num_prompt=1) == [2]


def test_who_has_waited_as_long_as_a_wake_takes_gets_one(stage):
    submit(stage)
    stage.now += 0.9 * WAKE_S
    assert woken(stage.room()) == []
    stage.now += 0.1 * WAKE_S
    assert woken(stage.room()) == [2]


def test_it_gets_one_though_nothing_happens_any_more(stage):
    submit(stage)
    assert woken(stage.tick()) == [2]


def test_what_waking_takes_is_learnt_from_those_that_loaded():
    stage = Stage(num_workers=8)
    for _ in range(3):
        for worker in range(1, 9):
            stage.ready(worker)  # in half a second
    assert stage.scheduler.registry.view.cost.wake_s == pytest.approx(0.5, rel=0.01)
    assert CostModel(wake_s=2.0).after_wake(1.0).wake_s == pytest.approx(1.7)


def test_the_first_wake_says_more_of_wakes_than_all_starts(stage):
    for worker in (2, 3):
        submit(stage, request_id=worker)
        stage.tick()
        stage.ready(worker)  # in half a second
    assert stage.scheduler.registry.view.cost.wake_s == pytest.approx(0.5)
