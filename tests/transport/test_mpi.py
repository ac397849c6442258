import pytest

from tests.mpi.harness import run_job
from tests.transport.conformance import SCENARIOS


@pytest.fixture(scope="module")
def conformance(tmp_path_factory):
    return run_job(4, "tests.mpi.conformance", directory=tmp_path_factory.mktemp("conformance"))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_the_mpi_transport_keeps_the_contract(scenario, conformance):
    for verdict in conformance.verdicts:
        assert scenario.__name__ in verdict.get("passed", ()), conformance.output


def test_the_job_ends_by_itself(conformance):
    assert conformance.returncode == 0, conformance.output
    assert all(verdict.get("finished") for verdict in conformance.verdicts)


@pytest.fixture(scope="module")
def loss(tmp_path_factory):
    return run_job(5, "tests.mpi.lost_worker", directory=tmp_path_factory.mktemp("loss"))


def survivors(outcome):
    assert outcome.verdicts[3] is None, outcome.output
    alive = [verdict for rank, verdict in enumerate(outcome.verdicts) if rank != 3]
    assert all(verdict and "lost" in verdict for verdict in alive), outcome.output
    return alive


def test_a_killed_worker_is_reported_exactly_once_to_everyone_else(loss):
    assert [verdict["lost"] for verdict in survivors(loss)] == [[3]] * 4


def test_all_that_the_killed_worker_got_out_arrives_before_the_news(loss):
    assert survivors(loss)[0]["heard"]["3"] == 100
    assert [verdict["after_the_loss"] for verdict in survivors(loss)] == [0] * 4


def test_transfers_with_the_killed_worker_end_as_failed(loss):
    assert [verdict["doomed_failed"] for verdict in survivors(loss)] == [[], [True], [True], [True]]
    assert [verdict["late_failed"] for verdict in survivors(loss)] == [[True, True]] * 4


def test_the_living_go_on_between_themselves_and_shut_mpi_down(loss):
    assert all("finish_s" in verdict for verdict in survivors(loss)), loss.output
    assert loss.returncode == 0, loss.output
