"""A cluster at rest runs no rebalancing rounds."""

import pytest

from mellmpi.scheduler.view import ParkWorker
from tests.scheduler.stage import Stage, report

PARKED_S = 1.0 + 2 * 1.0  # `park_after_s` and two rounds


@pytest.fixture
def stage():
    return Stage()


def runs_round(stage, at_s):
    """True if a tick at this time runs a round; its policy proposes to park worker 3."""
    stage.proposals = [ParkWorker(3)]
    commands = stage.scheduler.tick(at_s)
    has_run, stage.proposals = not stage.proposals, []
    assert has_run or not commands
    return has_run


def test_without_requests_rounds_go_on_until_workers_have_had_time_to_park(stage):
    assert runs_round(stage, stage.now + PARKED_S)


def test_a_cluster_at_rest_runs_no_round(stage):
    since_s = stage.now
    assert not stage.scheduler.at_rest(since_s + PARKED_S)
    assert stage.scheduler.at_rest(since_s + PARKED_S + 0.01)
    assert not runs_round(stage, since_s + PARKED_S + 0.01) and not runs_round(stage, since_s + 1e4)


def test_a_round_with_commands_postpones_the_rest(stage):
    since_s = stage.now
    assert runs_round(stage, since_s + 2.0) and runs_round(stage, since_s + 2.0 + PARKED_S)
    assert not runs_round(stage, since_s + 2.1 + 2 * PARKED_S)


def test_any_event_ends_the_rest(stage):
    stage.now = 1e3
    assert stage.scheduler.at_rest(stage.now)
    stage.handle(1, report())
    assert runs_round(stage, stage.now)


def test_with_a_live_request_there_is_no_rest(stage):
    stage.running()
    assert not stage.scheduler.at_rest(1e4) and runs_round(stage, 1e4)
