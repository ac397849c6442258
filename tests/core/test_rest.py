"""When the policy is asked at once, and when not at all."""

import pytest

from mellmpi.core.view import Move, ParkWorker
from mellmpi.protocol import FRONT, MigrationStarted, Park, Parked, Submit, Wake, WorkerReady
from tests.core.stage import KV, Stage, report, request, told

PARKED_S = 1.0 + 2 * 1.0  # `park_after_s` and two rounds


@pytest.fixture
def stage():
    return Stage()


def asked(stage, at_s):
    """Was the policy asked then? It parks worker 3."""
    stage.proposals = [ParkWorker(3)]
    commands = stage.scheduler.tick(at_s)
    was_asked, stage.proposals = not stage.proposals, []
    assert was_asked or not commands
    return was_asked


def test_with_no_request_the_policy_is_asked_until_all_can_have_been_parked(stage):
    assert asked(stage, stage.now + PARKED_S)


def test_a_cluster_at_rest_asks_no_policy(stage):
    since_s = stage.now
    assert not stage.scheduler.at_rest(since_s + PARKED_S)
    assert stage.scheduler.at_rest(since_s + PARKED_S + 0.01)
    assert not asked(stage, since_s + PARKED_S + 0.01) and not asked(stage, since_s + 1e4)


def test_what_a_round_does_is_followed_by_another(stage):
    since_s = stage.now
    assert asked(stage, since_s + 2.0) and asked(stage, since_s + 2.0 + PARKED_S)
    assert not asked(stage, since_s + 2.1 + 2 * PARKED_S)


def test_any_event_ends_the_rest(stage):
    stage.now = 1e3
    assert stage.scheduler.at_rest(stage.now)
    stage.tell(1, report())
    assert asked(stage, stage.now)


def test_as_long_as_there_is_a_request_there_is_no_rest(stage):
    stage.running()
    assert not stage.scheduler.at_rest(1e4) and asked(stage, 1e4)


def woken(stage):
    """Worker 3 was parked, and is waking."""
    stage.tick(ParkWorker(3))
    stage.tell(3, Parked(acked=1))
    stage.place_at = None
    [wake] = told(stage.tell(FRONT, Submit(request(8))), Wake)
    stage.place_at = 1
    return wake


def test_a_worker_that_has_woken_is_given_what_it_was_woken_for_at_once(stage):
    record = stage.running()
    woken(stage)
    stage.proposals = [Move(record.request.id, 3, "overflow", "transfer")]
    commands = stage.ready(3, acked=2)
    assert [m.dst for m in told(commands, MigrationStarted)] == [3]


def test_that_is_no_round_of_its_own(stage):
    stage.running()
    woken(stage)
    view = stage.scheduler.fleet.view
    before = view.tick, view.token_rate
    stage.ready(3, acked=2)
    assert (view.tick, view.token_rate) == before


def test_workers_that_start_with_nothing_to_do_ask_no_policy():
    stage = Stage()
    stage.proposals = [ParkWorker(3)]
    commands = stage.tell(2, WorkerReady((KV,), 200, 8, 0, 0.5, 64))
    assert told(commands, Park) == [] and stage.proposals
