"""Resuming on the same worker, and models that do not wait for each other."""

import pytest

from mellmpi.protocol import (
    FRONT,
    Assign,
    Cancel,
    ModelKv,
    Park,
    Request,
    Submit,
    WorkerChanged,
    WorkerLost,
    WorkerReady,
)
from mellmpi.scheduler import WorkerState
from mellmpi.scheduler.policies import POLICIES, policy_for
from mellmpi.scheduler.view import Drain, ParkWorker
from tests.scheduler.stage import KV, Stage, assert_nothing_left, report, request, to_workers, told

OTHER = ModelKv("other", block_size=4, block_bytes=40)


@pytest.fixture
def apart():
    """Workers 1 and 2 run one model, worker 3 the other."""
    stage = Stage()
    stage.tell(3, WorkerReady((OTHER,), 200, 8, 0, 0.5, 64, None, (), ""))
    stage.scheduler.registry.ledger._able["m"][3] = False
    return stage


@pytest.fixture
def stage():
    """Three workers under `best_fit`, which resumes at home."""
    stage = Stage()
    stage.scheduler.policy = POLICIES["best_fit"]
    return stage


def preempted(stage, request_id=7, **kwargs):
    """A request that its worker has just handed back; its two blocks do not fit there now."""
    record = stage.running(request_id, num_prompt=6, **kwargs)
    worker, epoch = record.owner
    stage.tell(worker, report(acked=1, free_blocks=1, preempted=((request_id, epoch),)))
    return record, worker


def assigned(commands):
    return [(w, c.request.id) for w, c in to_workers(commands) if isinstance(c, Assign)]


def test_who_was_preempted_waits_for_its_own_worker_though_others_are_empty(stage):
    record, worker = preempted(stage)
    assert worker == 1 and record.worker is None
    assert assigned(stage.tell(2, report())) == []
    assert assigned(stage.tell(1, report(acked=1, free_blocks=2))) == [(1, 7)]


def test_it_blocks_nobody_and_its_worker_takes_no_new_ones(stage):
    preempted(stage)
    assert assigned(stage.tell(FRONT, Submit(request(8, num_prompt=1)))) == [(2, 8)]


def test_once_it_is_back_its_worker_takes_new_ones_again(stage):
    preempted(stage)
    stage.tell(1, report(acked=1, free_blocks=5))
    assert assigned(stage.tell(FRONT, Submit(request(8, num_prompt=1)))) == [(1, 8)]


def test_a_smaller_one_may_go_back_before_an_older_one_that_does_not_fit(stage):
    older, younger = stage.running(7, num_prompt=40), stage.running(8, num_prompt=6)
    both = ((8, younger.epoch), (7, older.epoch))
    stage.tell(1, report(acked=2, free_blocks=1, preempted=both))
    assert assigned(stage.tell(1, report(acked=2, free_blocks=3))) == [(1, 8)]


def test_a_lost_home_frees_the_request_from_it(stage):
    preempted(stage)
    assert assigned(stage.tell(1, WorkerLost(1))) == [(2, 7)]


def test_a_draining_home_frees_the_request_from_it(stage):
    record, _ = preempted(stage)
    rebalance = stage._rebalance
    stage.scheduler.policy = type(stage.scheduler.policy)(
        stage.scheduler.policy.place, rebalance, resumes_at_home=True
    )
    stage.tick(Drain(1))
    assert assigned(stage.tell(2, report())) == [(2, 7)] and record.worker == 2


def test_a_home_that_it_has_outgrown_is_none(stage):
    stage.ready(2, num_blocks=40)
    record = stage.running(7, num_prompt=78, tokens=())
    assert record.worker == 1
    grown = report(
        (7, record.epoch, 0, (1, 2, 3)), acked=1, free_blocks=20, preempted=((7, record.epoch),)
    )
    assert assigned(stage.tell(1, grown)) == [(2, 7)]


def test_a_cancelled_request_leaves_its_home(stage):
    preempted(stage)
    stage.tell(FRONT, Cancel(7, "gone"))
    assert_nothing_left(stage.scheduler)
    stage.tell(1, report(acked=1, free_blocks=20))
    assert assigned(stage.tell(FRONT, Submit(request(8)))) == [(1, 8)]


def test_where_nothing_ever_moves_who_was_preempted_resumes_at_home():
    home = {name for name, policy in POLICIES.items() if policy.resumes_at_home}
    assert home == {"best_fit", "worst_fit"}
    assert all(policy_for(name, "never").resumes_at_home for name in POLICIES)
    assert not policy_for("best_fit", "stress").resumes_at_home


# --- several models ------------------------------------------------------------------------------


def other(request_id):
    return Request(request_id, OTHER.model, (1, 2, 3), request(request_id).sampling, None)


def test_a_model_whose_workers_are_full_does_not_keep_another_waiting(stage):
    stage.tell(3, WorkerReady((OTHER,), 200, 8, 0, 0.5, 64, None, (), ""))
    stage.scheduler.registry.ledger._able["m"][3] = False
    stage.tell(3, report(free_blocks=0))
    assert assigned(stage.tell(FRONT, Submit(other(1)))) == []
    assert assigned(stage.tell(FRONT, Submit(request(2)))) == [(1, 2)]
    assert assigned(stage.tell(3, report(acked=0, free_blocks=20))) == [(3, 1)]


def test_a_worker_grows_by_the_kv_of_the_models_of_its_requests(stage):
    stage.tell(3, WorkerReady((KV, OTHER), 400, 8, 0, 0.5, 64, None, (), ""))
    stage.tell(FRONT, Submit(other(1)))  # 10 bytes a token
    stage.scheduler.policy = policy_for("worst_fit", "auto")
    stage.tell(FRONT, Submit(request(2)))  # 2.5 bytes a token
    assert stage.scheduler.registry.ledger.num_requests.tolist() == [0, 0, 0, 2]
    stage.scheduler.tick(10.0)
    for worker in (1, 3):
        stage.tell(worker, report(decode_tokens=20, acked=0))
    stage.scheduler.tick(12.0)
    growth = stage.scheduler.registry.view.growth_Bps
    tokens_a_second = 0.3 * 10  # what is new counts as 0.3
    assert growth[3] == pytest.approx(tokens_a_second * (10 + 2.5) / 2)
    # All that it held has ended since: the only model that it has.
    assert growth[1] == pytest.approx(tokens_a_second * 2.5)


def test_only_a_draining_worker_of_the_model_is_called_back(apart):
    apart.running(1)
    apart.tick(Drain(1), Drain(3))
    apart.place_at = None
    apart.tell(FRONT, Submit(other(2)))
    assert apart.scheduler.registry.ledger.workers(WorkerState.DRAINING) == [1]


def test_the_last_active_worker_of_a_model_is_drained_only_when_nobody_asks_for_the_model(apart):
    apart.place_at = 3
    apart.tell(FRONT, Submit(other(1)))
    drained = told(apart.tick(Drain(3), Drain(2)), WorkerChanged)
    assert drained[0] == WorkerChanged(2, "draining") and {c.worker for c in drained} == {2}
    apart.tell(FRONT, Cancel(1, "gone"))
    assert WorkerChanged(3, "draining") in told(apart.tick(Drain(3)), WorkerChanged)


def test_the_last_active_worker_of_a_model_is_parked_only_when_nobody_asks_for_the_model(apart):
    apart.place_at = None
    apart.tell(FRONT, Submit(other(1)))
    assert not told(apart.tick(ParkWorker(3)), Park)
    assert told(apart.tick(ParkWorker(2)), Park)
    apart.tell(FRONT, Cancel(1, "gone"))
    assert told(apart.tick(ParkWorker(3)), Park)
