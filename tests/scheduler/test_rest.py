"""When the policy is not asked at all."""

import pytest

from mellmpi.scheduler.view import ParkWorker
from tests.scheduler.stage import Stage, report

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
