"""Requests pinned to the worker that preempted them, and queues of several models."""

from dataclasses import replace

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
from tests.scheduler.stage import (
    KV,
    Stage,
    assert_nothing_left,
    of_type,
    report,
    request,
    to_workers,
)

OTHER = ModelKv("other", block_size=4, block_bytes=40)


@pytest.fixture
def apart():
    """Workers 1 and 2 run one model, worker 3 the other."""
    stage = Stage()
    stage.handle(3, WorkerReady((OTHER,), 200, 8, 0, 0.5, 64, None, (), ""))
    stage.scheduler.registry.ledger._able["m"][3] = False
    return stage


@pytest.fixture
def stage():
    """Three workers under `best_fit`, which pins preempted requests."""
    stage = Stage()
    stage.scheduler.placement.policy = POLICIES["best_fit"]
    return stage


def preempted(stage, request_id=7, **kwargs):
    """A request that its worker has just preempted; its two blocks do not fit there now."""
    record = stage.running(request_id, num_prompt=6, **kwargs)
    worker, epoch = record.owner
    stage.handle(worker, report(acked=1, free_blocks=1, preempted=((request_id, epoch),)))
    return record, worker


def assigned(commands):
    return [(w, c.request.id) for w, c in to_workers(commands) if isinstance(c, Assign)]


def test_a_pinned_request_waits_for_its_worker_even_if_others_are_empty(stage):
    record, worker = preempted(stage)
    assert worker == 1 and record.worker is None
    assert assigned(stage.handle(2, report())) == []
    assert assigned(stage.handle(1, report(acked=1, free_blocks=2))) == [(1, 7)]


def test_a_pinned_request_blocks_only_its_worker(stage):
    preempted(stage)
    assert assigned(stage.handle(FRONT, Submit(request(8, num_prompt=1)))) == [(2, 8)]


def test_after_its_pinned_request_has_resumed_a_worker_takes_new_ones(stage):
    preempted(stage)
    stage.handle(1, report(acked=1, free_blocks=5))
    assert assigned(stage.handle(FRONT, Submit(request(8, num_prompt=1)))) == [(1, 8)]


def test_a_smaller_request_may_resume_before_an_older_one_that_does_not_fit(stage):
    older, younger = stage.running(7, num_prompt=40), stage.running(8, num_prompt=6)
    both = ((8, younger.epoch), (7, older.epoch))
    stage.handle(1, report(acked=2, free_blocks=1, preempted=both))
    assert assigned(stage.handle(1, report(acked=2, free_blocks=3))) == [(1, 8)]


def test_the_loss_of_its_worker_unpins_a_request(stage):
    preempted(stage)
    assert assigned(stage.handle(1, WorkerLost(1))) == [(2, 7)]


def test_draining_its_worker_unpins_a_request(stage):
    record, _ = preempted(stage)
    placement = stage.scheduler.placement
    placement.policy = replace(placement.policy, rebalance=stage._rebalance)
    stage.tick(Drain(1))
    assert assigned(stage.handle(2, report())) == [(2, 7)] and record.worker == 2


def test_a_request_too_large_for_its_worker_is_not_pinned(stage):
    stage.ready(2, num_blocks=40)
    record = stage.running(7, num_prompt=78, tokens=())
    assert record.worker == 1
    grown = report(
        (7, record.epoch, 0, (1, 2, 3)), acked=1, free_blocks=20, preempted=((7, record.epoch),)
    )
    assert assigned(stage.handle(1, grown)) == [(2, 7)]


def test_cancelling_a_pinned_request_frees_its_worker(stage):
    preempted(stage)
    stage.handle(FRONT, Cancel(7, "gone"))
    assert_nothing_left(stage.scheduler)
    stage.handle(1, report(acked=1, free_blocks=20))
    assert assigned(stage.handle(FRONT, Submit(request(8)))) == [(1, 8)]


def test_policies_without_moves_pin_preempted_requests():
    pinning = {name for name, policy in POLICIES.items() if policy.resumes_at_home}
    assert pinning == {"best_fit", "worst_fit"}
    assert all(policy_for(name, "never").resumes_at_home for name in POLICIES)
    assert not policy_for("best_fit", "stress").resumes_at_home


# --- several models ------------------------------------------------------------------------------


def other(request_id):
    return Request(request_id, OTHER.model, (1, 2, 3), request(request_id).sampling, None, 0, None)


def test_a_model_whose_workers_are_full_does_not_delay_another(stage):
    stage.handle(3, WorkerReady((OTHER,), 200, 8, 0, 0.5, 64, None, (), ""))
    stage.scheduler.registry.ledger._able["m"][3] = False
    stage.handle(3, report(free_blocks=0))
    assert assigned(stage.handle(FRONT, Submit(other(1)))) == []
    assert assigned(stage.handle(FRONT, Submit(request(2)))) == [(1, 2)]
    assert assigned(stage.handle(3, report(acked=0, free_blocks=20))) == [(3, 1)]


def test_growth_counts_the_kv_of_the_models_of_a_worker_s_requests(stage):
    stage.handle(3, WorkerReady((KV, OTHER), 400, 8, 0, 0.5, 64, None, (), ""))
    stage.handle(FRONT, Submit(other(1)))  # 10 bytes a token
    stage.scheduler.placement.policy = policy_for("worst_fit", "auto")
    stage.handle(FRONT, Submit(request(2)))  # 2.5 bytes a token
    assert stage.scheduler.registry.ledger.num_requests.tolist() == [0, 0, 0, 2]
    stage.scheduler.tick(10.0)
    for worker in (1, 3):
        stage.handle(worker, report(decode_tokens=20, acked=0))
    stage.scheduler.tick(12.0)
    growth = stage.scheduler.registry.view.growth_Bps
    tokens_a_second = 0.3 * 10  # weight of the newest interval: 0.3
    assert growth[3] == pytest.approx(tokens_a_second * (10 + 2.5) / 2)
    # Its requests have ended: the growth of its only model.
    assert growth[1] == pytest.approx(tokens_a_second * 2.5)


def test_only_a_draining_worker_of_the_model_becomes_active_again(apart):
    apart.running(1)
    apart.tick(Drain(1), Drain(3))
    apart.place_at = None
    apart.handle(FRONT, Submit(other(2)))
    assert apart.scheduler.registry.ledger.workers(WorkerState.DRAINING) == [1]


def test_the_last_active_worker_of_a_model_is_drained_only_if_no_request_uses_the_model(apart):
    apart.place_at = 3
    apart.handle(FRONT, Submit(other(1)))
    drained = of_type(apart.tick(Drain(3), Drain(2)), WorkerChanged)
    assert drained[0] == WorkerChanged(2, "draining") and {c.worker for c in drained} == {2}
    apart.handle(FRONT, Cancel(1, "gone"))
    assert WorkerChanged(3, "draining") in of_type(apart.tick(Drain(3)), WorkerChanged)


def test_the_last_active_worker_of_a_model_is_parked_only_if_no_request_uses_the_model(apart):
    apart.place_at = None
    apart.handle(FRONT, Submit(other(1)))
    assert not of_type(apart.tick(ParkWorker(3)), Park)
    assert of_type(apart.tick(ParkWorker(2)), Park)
    apart.handle(FRONT, Cancel(1, "gone"))
    assert of_type(apart.tick(ParkWorker(3)), Park)
