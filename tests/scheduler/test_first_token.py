"""The predicted time to the first token, and the limit on it."""

from dataclasses import replace

import pytest

from mellmpi.config import ClusterConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import (
    FRONT,
    Cancel,
    DrainWorker,
    Parked,
    Rejected,
    Submit,
    WorkerLost,
)
from mellmpi.scheduler.first_token import RECENT_S, Correction
from mellmpi.scheduler.requests import State
from mellmpi.scheduler.view import ParkWorker, WakeWorker
from tests.scheduler.stage import Stage, of_type, report, request

STEP_S, PREFILL_S = 0.1, 0.01


@pytest.fixture
def stage():
    """Workers of 80 tokens; a request that is served decodes 10 tokens a second."""
    stage = Stage()
    registry = stage.scheduler.registry
    registry.view.cost = CostModel(PREFILL_S, STEP_S, 1e-9, 4e9, 1e-3, wake_s=2.0)
    registry._estimates = None
    registry.view.token_rate = registry.view.answer_tokens = 10.0
    return stage


def predicted(stage, num_prompt=20, priority=0):
    return stage.scheduler.predicted_ttft_s("m", num_prompt, stage.now, priority)


def wait_s(stage, num_prompt=20, priority=0):
    """The part of the prediction that is spent in the queue."""
    first_tokens = stage.scheduler.placement.first_tokens
    return first_tokens.forecast("m", num_prompt, priority, stage.now).wait_s


def limit(stage, seconds):
    stage.scheduler.config = replace(stage.scheduler.config, max_ttft_s=seconds)


def submit(stage, request_id, **kwargs):
    """Returns its Rejected, or None."""
    commands = stage.handle(FRONT, Submit(request(request_id, **kwargs)))
    return next(iter(of_type(commands, Rejected)), None)


def fill(stage, workers=(1, 2, 3)):
    """A request of a full worker on each of them."""
    for worker in workers:
        stage.place_at = worker
        stage.running(100 + worker, num_prompt=70, tokens=())
    stage.place_at = None


def test_an_empty_cluster_takes_the_time_of_the_prefill(stage):
    assert predicted(stage, 20) == pytest.approx(STEP_S + 20 * PREFILL_S, rel=0.01)


def test_prompts_that_are_queued_on_a_worker_come_first(stage):
    before = predicted(stage)
    stage.running(1, num_prompt=20, tokens=())
    assert predicted(stage) == pytest.approx(2 * before, rel=0.01)
    stage.handle(1, report((1, stage.scheduler.records[1].epoch, 0, (5,)), free_blocks=14))
    assert predicted(stage) < 1.5 * before


def test_a_request_for_which_no_worker_has_room_waits_until_one_ends(stage):
    fill(stage)  # each ends in a second: three a second
    assert wait_s(stage, 4) == 0.0  # 20 bytes are free on each
    # 30 tokens of growth, 75 bytes, less the free 60; 180 bytes free 180 at three ends a second.
    assert wait_s(stage, 70) == pytest.approx((180 + 15) / (180 * 3))


def test_the_wait_grows_with_the_requests_before_it_and_shrinks_when_they_leave(stage):
    fill(stage)
    before = predicted(stage, 20)
    for i in range(1, 7):
        stage.waiting(i, num_prompt=40)
    behind = predicted(stage, 20)
    assert behind > before + 0.5
    for i in range(1, 7):
        stage.handle(FRONT, Cancel(i, "gone"))
    assert predicted(stage, 20) == pytest.approx(before)


def test_only_requests_of_at_least_its_priority_come_before_it(stage):
    fill(stage)
    before = predicted(stage)
    stage.waiting(1, num_prompt=40, priority=5)
    assert predicted(stage, priority=4) == pytest.approx(before)
    assert predicted(stage, priority=5) > before


def test_requests_that_run_longer_than_finished_ones_slow_the_queue(stage):
    fill(stage)
    for _ in range(20):
        stage.scheduler.registry.finished(2)
    stage.waiting(1, num_prompt=40)
    before = wait_s(stage)
    record = stage.scheduler.records[101]
    stage.handle(1, report((101, record.epoch, 0, tuple(range(9))), free_blocks=0))
    assert wait_s(stage) > before


def park(stage, worker):
    stage.tick(ParkWorker(worker))
    stage.handle(worker, Parked(acked=1))


def test_a_parked_worker_shortens_the_wait_to_the_time_of_a_wake(stage):
    park(stage, 3)
    fill(stage, (1, 2))
    stage.scheduler.registry.view.answer_tokens = 1000.0
    assert wait_s(stage) == 2.0
    stage.handle(FRONT, DrainWorker(3))
    assert wait_s(stage) > 10.0  # a held worker does not come back


def test_the_time_for_which_a_worker_has_been_waking_is_over(stage):
    park(stage, 3)
    fill(stage, (1, 2))
    stage.scheduler.registry.view.answer_tokens = 1000.0
    stage.tick(WakeWorker(3))
    assert wait_s(stage) == 2.0
    stage.now += 1.5
    assert wait_s(stage) == pytest.approx(0.5)
    stage.now += 1.5
    assert wait_s(stage) == 0.0


def test_without_an_active_worker_and_without_one_to_wake_a_start_is_expected(stage):
    for worker in (1, 2, 3):
        stage.handle(worker, WorkerLost(worker))
    assert predicted(stage) >= 2.0


# --- the limit -----------------------------------------------------------------------------------


def test_a_request_over_the_limit_is_refused_at_once_with_the_time_to_come_again(stage):
    fill(stage)
    for i in range(1, 7):
        stage.waiting(i, num_prompt=40)
    limit(stage, 1.0)
    expected = predicted(stage, 20)
    refused = submit(stage, 9, num_prompt=20)
    assert refused.reason == (
        f"its first token is expected in {expected:.1f} s; the limit is 1 s (--max-ttft-s)"
    )
    assert refused.retry_after_s == pytest.approx(expected - 1.0, abs=0.1)
    assert 9 not in stage.scheduler.records


def test_requests_accepted_before_are_never_refused(stage):
    fill(stage)
    for i in range(1, 7):
        stage.waiting(i, num_prompt=40)
    limit(stage, 1e-3)
    stage.tick()
    record = stage.scheduler.records[101]
    stage.handle(1, report(preempted=((101, record.epoch),), free_blocks=0))
    assert record.state is State.WAITING and len(stage.scheduler.records) == 9


def test_a_prompt_that_alone_takes_longer_than_the_limit_is_refused_for_good(stage):
    limit(stage, 0.25)
    assert submit(stage, 1, num_prompt=10) is None
    refused = submit(stage, 2, num_prompt=60)
    assert refused.reason == (
        "computing its prompt of 60 tokens takes 0.7 s; the limit is 0.25 s (--max-ttft-s)"
    )
    assert refused.retry_after_s == 0.0


def test_a_priority_that_goes_first_is_accepted_where_others_are_refused(stage):
    fill(stage)
    for i in range(1, 7):
        stage.waiting(i, num_prompt=40)
    limit(stage, 2.0)
    assert submit(stage, 8, num_prompt=20) is not None
    assert submit(stage, 9, num_prompt=20, priority=-1) is None


def test_no_limit_is_the_default_and_a_limit_must_be_positive():
    assert ClusterConfig().max_ttft_s is None
    with pytest.raises(ValueError, match="--max-ttft-s must be over 0"):
        ClusterConfig(max_ttft_s=0.0)


# --- correction ----------------------------------------------------------------------------------


def test_the_prefill_is_corrected_by_the_median_of_actual_over_predicted(stage):
    before = predicted(stage, 20)
    for i in range(1, 8):
        stage.running(i, num_prompt=20, tokens=())
        stage.now += 3 * before - 0.01
        epoch = stage.scheduler.records[i].epoch
        stage.handle(1, report((i, epoch, 0, tuple(range(10))), acked=i))
    assert predicted(stage, 20) == pytest.approx(3 * before, rel=0.1)
    stage.now += RECENT_S + 1
    assert predicted(stage, 20) == pytest.approx(before)


def test_a_request_preempted_before_its_first_token_teaches_nothing(stage):
    before = predicted(stage, 20)
    record = stage.running(1, num_prompt=20, tokens=())
    stage.handle(1, report(preempted=((1, record.epoch),)))
    stage.now += 100.0
    stage.handle(1, report((1, record.epoch, 0, tuple(range(10))), acked=2))
    assert predicted(stage, 20) == pytest.approx(before)


def test_a_factor_is_a_median_within_bounds():
    correction = Correction()
    assert correction.factor(0.0) == 1.0
    for actual_s in (2.0, 1000.0, 1e-9):
        correction.add(0.0, 1.0, actual_s)
    assert correction.factor(0.0) == 2.0
    correction.add(1.0, 0.0, 5.0)  # nothing was predicted
    assert correction.factor(1.0) == 2.0
    for _ in range(5):
        correction.add(RECENT_S, 1.0, 1000.0)
    assert correction.factor(RECENT_S) == 8.0
    assert correction.factor(3 * RECENT_S) == 1.0
