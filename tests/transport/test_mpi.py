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
