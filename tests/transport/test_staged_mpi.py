import pytest

from tests.mpi import harness
from tests.mpi.harness import run_job
from tests.mpi.staged_conformance import STAGED


@pytest.fixture(scope="module", params=["FLAGS", "OVER_TCP steps"])
def conformance(request, tmp_path_factory):
    """ "steps": blocks move in the main thread only."""
    flags, *args = request.param.split()
    return run_job(
        4,
        "tests.mpi.staged_conformance",
        *args,
        directory=tmp_path_factory.mktemp("staged"),
        flags=getattr(harness, flags),
    )


@pytest.mark.parametrize("scenario", STAGED, ids=lambda s: s.__name__)
def test_staged_blocks_of_a_device_keep_the_contract(scenario, conformance):
    for verdict in conformance.verdicts:
        assert verdict and scenario.__name__ in verdict.get("passed", ()), conformance.output


def test_the_job_ends_by_itself(conformance):
    assert conformance.returncode == 0, conformance.output
