import pytest

from tests.mpi import harness
from tests.mpi.harness import run_job
from tests.transport.conformance import SCENARIOS


@pytest.fixture(
    scope="module",
    params=[
        "FLAGS",
        "FLAGS steps",
        "FLAGS messages",
        "OVER_TCP messages",
        "WITHOUT_CMA messages steps",
    ],
)
def conformance(request, tmp_path_factory):
    """ "steps": blocks move in the main thread only; "messages": no cross-memory reads."""
    flags, *args = request.param.split()
    directory = tmp_path_factory.mktemp("conformance")
    return run_job(
        4, "tests.mpi.conformance", *args, directory=directory, flags=getattr(harness, flags)
    )


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_the_mpi_transport_keeps_the_contract(scenario, conformance):
    for verdict in conformance.verdicts:
        assert scenario.__name__ in verdict.get("passed", ()), conformance.output


def test_the_job_ends_in_spite_of_unfinished_transfers(conformance):
    assert conformance.returncode == 0, conformance.output
    assert all(verdict.get("finished") for verdict in conformance.verdicts)
    assert [verdict["ended"] for verdict in conformance.verdicts] == [[True, True]] * 4


@pytest.fixture(scope="module", params=["FLAGS", "FLAGS messages", "OVER_TCP messages"])
def loss(request, tmp_path_factory):
    name, *args = request.param.split()
    flags = getattr(harness, name)
    directory = tmp_path_factory.mktemp("loss")
    return run_job(5, "tests.mpi.lost_worker", *args, directory=directory, flags=flags)


def survivors(outcome):
    assert outcome.verdicts[3] is None, outcome.output
    surviving = [verdict for rank, verdict in enumerate(outcome.verdicts) if rank != 3]
    assert all(verdict and "lost" in verdict for verdict in surviving), outcome.output
    return surviving


def test_a_killed_worker_is_reported_exactly_once_to_everyone_else(loss):
    assert [verdict["lost"] for verdict in survivors(loss)] == [[3]] * 4


def test_messages_of_the_killed_worker_arrive_without_gaps_before_the_report(loss):
    assert survivors(loss)[0]["heard"]["3"] > 0  # the last ones may have died with it
    assert all(verdict["in_order"] for verdict in survivors(loss))
    assert [verdict["after_the_loss"] for verdict in survivors(loss)] == [0] * 4


def test_transfers_with_the_killed_worker_end_as_failed(loss):
    lost = ["peer lost"]
    assert [verdict["doomed_failed"] for verdict in survivors(loss)] == [[], lost, lost, lost]
    assert [verdict["late_failed"] for verdict in survivors(loss)] == [lost * 2] * 4


def test_the_survivors_go_on_and_shut_mpi_down(loss):
    assert all("finish_s" in verdict for verdict in survivors(loss)), loss.output
    assert loss.returncode == 0, loss.output


@pytest.fixture
def start(tmp_path):
    return lambda case: run_job(4, "tests.mpi.starting", case, directory=tmp_path)


def test_ranks_share_rank_0s_settings_and_refuse_a_mixed_installation(start):
    outcome = start("share")
    assert outcome.returncode == 0, outcome.output
    for rank, verdict in enumerate(outcome.verdicts):
        assert verdict["shared"] and verdict["num_workers"] == 3 and verdict["worker"] == rank
        assert verdict["local_ranks"] == [0, 1, 2, 3] and verdict["num_hosts"] == 4
        assert verdict["refusal"].startswith("ranks [2] (on ")
        assert not verdict["yields"], "every poll would yield the core"


def test_one_rank_alone_needs_no_finish(tmp_path):
    flags = harness.WITHOUT_ULFM  # under ULFM mpirun accepts a missing MPI_Finalize
    outcome = run_job(1, "tests.mpi.starting", "alone", directory=tmp_path, flags=flags)
    assert outcome.returncode == 0 and outcome.verdicts == [{"size": 1}], outcome.output


def test_an_abort_ends_every_rank_with_its_exit_code(start):
    outcome = start("abort")
    assert outcome.returncode == 7, outcome.output
    assert outcome.verdicts == [None] * 4


def test_an_abort_ends_every_rank_with_its_exit_code_without_ulfm_too(tmp_path):
    flags = harness.WITHOUT_ULFM
    outcome = run_job(4, "tests.mpi.starting", "abort", directory=tmp_path, flags=flags)
    assert outcome.returncode == 7 and outcome.verdicts == [None] * 4, outcome.output


def test_a_vanished_worker_is_lost_and_the_others_finish_well(start):
    outcome = start("vanish")
    assert outcome.returncode == 0, outcome.output
    finished = {"lost": 1, "finished": True}
    assert outcome.verdicts == [finished, None, finished, finished]


def test_workers_that_find_the_scheduler_lost_end_the_job_as_failed(start):
    outcome = start("orphans")
    assert outcome.returncode not in (0, None), outcome.output
    assert outcome.verdicts[0] is None
    assert {"lost": 0} in outcome.verdicts
