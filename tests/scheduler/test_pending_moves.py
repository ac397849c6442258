"""The load of migrations in flight counts for moves that are planned later."""

import pytest

from mellmpi.costs import CostModel
from mellmpi.protocol import KvRefused, MigrationStarted
from mellmpi.scheduler import MoveProposal
from mellmpi.scheduler.requests import State
from tests.scheduler.stage import Stage, of_type


@pytest.fixture
def stage():
    """Its only link carries 5 bytes a second: a large move takes longer than any limit."""
    stage = Stage()
    stage.scheduler.registry.view.cost = CostModel(1.0, 0.01, 1e-9, 5.0, 0.0)
    stage.scheduler.registry._estimates = None
    return stage


def test_a_move_waits_for_one_that_began_in_an_earlier_round(stage):
    first, second = stage.running(7, num_prompt=39), stage.running(8, num_prompt=3)
    stage.tick(MoveProposal(7, 2, "test"))
    assert first.state is State.RESERVING
    stage.tick(MoveProposal(8, 2, "test"))
    assert second.state is State.RUNNING
    stage.handle(2, KvRefused(7, first.offer.epoch))
    stage.tick(MoveProposal(8, 2, "test"))
    assert second.state is State.RESERVING


def test_a_move_in_flight_lengthens_the_prediction_of_a_later_one(stage):
    for request_id, num_prompt in ((7, 39), (8, 11), (9, 11)):
        stage.running(request_id, num_prompt=num_prompt)
    [alone] = of_type(stage.tick(MoveProposal(8, 2, "test", "transfer")), MigrationStarted)
    record = stage.scheduler.records[8]
    stage.handle(2, KvRefused(8, record.offer.epoch))
    stage.tick(MoveProposal(7, 2, "test", "transfer"))
    [behind] = of_type(stage.tick(MoveProposal(9, 2, "test", "transfer")), MigrationStarted)
    assert behind.num_bytes == alone.num_bytes and behind.predicted_s > 1.5 * alone.predicted_s
