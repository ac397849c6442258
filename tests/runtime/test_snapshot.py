"""Snapshots of a real cluster scheduler: no request is missing, none is shown twice."""

import json

import pytest

from mellmpi.config import ClusterConfig
from mellmpi.protocol import FRONT, KvReserved, Parked, Submit, WorkerLost
from mellmpi.runtime.snapshot import LISTED, QUEUED, JobDescription, Snapshots
from mellmpi.scheduler import ClusterScheduler, MoveProposal
from mellmpi.scheduler.policies import policy_for
from mellmpi.scheduler.requests import State
from mellmpi.scheduler.view import Drain, ParkWorker, WakeWorker
from mellmpi.telemetry import Recent
from tests.scheduler.stage import KV, NUM_BLOCKS, Stage, received, request
from tests.sim.histories import random_history

HISTORIES = 60


def snapshots(scheduler, recent=None):
    job = JobDescription("1.2", "frugal", ["m"], ["head", "a", "a", "b"], start_s=-5.0)
    return Snapshots(scheduler, recent or Recent(), job)


@pytest.fixture
def stage():
    return Stage()


def taken(stage, **fields):
    return snapshots(stage.scheduler).take(stage.now, 1e9, **fields)


def check(snapshot, scheduler):
    """Every live request is shown once, and the segments add up to what is used."""
    json.loads(json.dumps(snapshot, allow_nan=False))
    shown = {}
    for worker in snapshot["workers"]:
        requests = worker["requests"]
        assert worker["num_requests"] == len(requests)
        assert worker["kv_bytes"] == sum(r["kv_bytes"] for r in requests)
        assert [r["kv_bytes"] for r in requests] == sorted(
            (r["kv_bytes"] for r in requests), reverse=True
        )
        for r in requests:
            assert r["id"] not in shown and (r["state"] == "moving") == (r["to"] is not None)
            assert r["to"] != worker["id"]
            shown[r["id"]] = (worker["id"], r["state"], r["output_tokens"])
    waiting = snapshot["waiting"]
    assert waiting["count"] == len(scheduler.queue)
    assert all(0 <= r["waited_s"] <= waiting["oldest_s"] for r in waiting["requests"])
    shown |= {r["id"]: (None, "waiting", None) for r in waiting["requests"]}
    for id, record in scheduler.records.items():
        worker, state, num_outputs = shown.pop(id)
        assert worker == record.worker
        moving = record.state in (State.RESERVING, State.SENDING)
        assert state == ("waiting" if worker is None else "moving" if moving else "running")
        assert num_outputs in (None, len(record.log.tokens))
    assert not shown


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_in_random_histories_every_live_request_is_shown_once(seed):
    sim, _ = random_history(seed)
    scheduler, recent = sim.scheduler, Recent()
    watch = snapshots(scheduler, recent)
    handle, tick = scheduler.handle, scheduler.tick

    def watched(now, commands):
        recent.commands(now, commands)
        check(watch.take(now, 1e9 + now), scheduler)
        return commands

    def observed(source, event, now):
        recent.observe(now, source, event)
        return watched(now, handle(source, event, now))

    scheduler.handle, scheduler.tick = observed, lambda now: watched(now, tick(now))
    outcome = sim.run()
    totals = watch.take(sim.now, 0.0)["totals"]
    assert totals["output_tokens"] == sum(map(len, outcome.outputs.values()))
    assert 0 <= totals["gpu_seconds"] <= totals["gpu_seconds_all_on"]


def test_a_running_request_has_its_bytes_and_tokens(stage):
    stage.running(7, tokens=(5, 6), num_prompt=4)
    worker = taken(stage)["workers"][0]
    assert worker["kv_bytes"] == 2 * KV.block_bytes
    assert worker["kv_capacity"] == NUM_BLOCKS * KV.block_bytes
    assert worker["requests"] == [
        {
            "id": 7,
            "state": "running",
            "kv_bytes": 2 * KV.block_bytes,
            "prompt_tokens": 4,
            "output_tokens": 2,
            "to": None,
        }
    ]


def test_a_moving_request_is_shown_at_its_source_with_its_destination(stage):
    record = stage.reserving(dst=2)
    assert taken(stage)["workers"][0]["requests"][0]["to"] == 2
    stage.handle(2, KvReserved(7, record.offer.epoch, record.offer.start))
    shown = taken(stage)["workers"]
    assert shown[0]["requests"][0]["state"] == "moving" and not shown[1]["requests"]
    stage.handle(2, received(record, first=1))
    shown = taken(stage)["workers"]
    assert not shown[0]["requests"] and shown[1]["requests"][0]["state"] == "running"


def test_waiting_requests_are_listed_in_their_order_up_to_a_limit(stage):
    stage.running(1)
    for id in range(2, QUEUED + 12):
        stage.waiting(id)
    waiting = taken(stage)["waiting"]
    assert waiting["count"] == QUEUED + 10
    assert [r["id"] for r in waiting["requests"]] == list(range(2, QUEUED + 2))
    assert waiting["oldest_s"] == waiting["requests"][0]["waited_s"] > 0


def test_states_have_the_names_that_are_documented(stage):
    stage.running(7)
    assert [w["state"] for w in taken(stage)["workers"]] == ["active"] * 3
    stage.tick(Drain(1), ParkWorker(2))
    assert [w["state"] for w in taken(stage)["workers"]] == ["draining", "parked", "active"]
    stage.handle(2, Parked(1))
    assert taken(stage)["workers"][1]["state"] == "parked"
    stage.tick(WakeWorker(2))
    stage.handle(3, WorkerLost(3))
    assert [w["state"] for w in taken(stage)["workers"]][1:] == ["waking", "lost"]


def test_hosts_and_workers_held_by_an_operator_are_named(stage):
    stage.scheduler.registry.ledger.held[2] = True
    workers = taken(stage)["workers"]
    assert [w["host"] for w in workers] == ["a", "a", "b"]
    assert [w["held"] for w in workers] == [False, True, False]


def test_the_job_is_ready_once_a_worker_is_and_says_why_it_is_not(stage):
    empty = ClusterScheduler(2, ClusterConfig(), policy_for("frugal", "auto"))
    before = snapshots(empty).take(0.0, 1e9)
    assert (before["ready"], before["reason"]) == (False, "workers are starting")
    ready = taken(stage)
    assert (ready["ready"], ready["reason"]) == (True, "") and ready["uptime_s"] == stage.now + 5
    assert taken(stage, problem="draining")["reason"] == "draining"
    for worker in (1, 2, 3):
        stage.handle(worker, WorkerLost(worker))
    assert taken(stage)["reason"] == "no worker is left"


def test_migrations_come_newest_first_with_predicted_and_actual_seconds():
    stage, recent = Stage(), Recent()
    for id in (7, 8):
        record = stage.running(id)
        recent.commands(10.0, stage.tick(MoveProposal(id, 2, "test", "transfer")))
        stage.handle(2, KvReserved(id, record.offer.epoch, record.offer.start))
        recent.commands(10.25, stage.handle(2, received(record, first=1, num_bytes=id)))
    newest, oldest = snapshots(stage.scheduler, recent).take(11.0, 1011.0)["migrations"]
    assert (newest["request"], oldest["request"]) == (8, 7)
    assert newest["time"] == 1010.25 and newest["seconds"] == 0.25 and newest["bytes"] == 8
    assert newest["predicted_s"] > 0 and (newest["src"], newest["dst"]) == (1, 2)
    assert (newest["reason"], newest["mode"], newest["outcome"]) == ("test", "transfer", "moved")


def test_of_many_requests_on_a_worker_the_largest_are_listed_and_all_are_counted():
    stage = Stage(num_workers=1)
    stage.ready(1, num_blocks=40 * LISTED)
    stage.scheduler.registry.ledger.max_requests[1] = 10 * LISTED
    for id in range(LISTED + 20):
        stage.handle(FRONT, Submit(request(id, num_prompt=4 + id)))
    (worker,) = taken(stage)["workers"]
    assert worker["num_requests"] == LISTED + 20 and len(worker["requests"]) == LISTED
    least = min(r["kv_bytes"] for r in worker["requests"])
    assert worker["kv_bytes"] > sum(r["kv_bytes"] for r in worker["requests"])
    assert least >= worker["kv_bytes"] / worker["num_requests"] / 2
