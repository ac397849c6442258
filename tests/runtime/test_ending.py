"""An error of any rank ends all ranks, is printed once, and determines the exit code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mellmpi import launcher
from mellmpi.config import UsageError
from mellmpi.runtime import ending
from mellmpi.runtime.ending import FAULT, INTERRUPTED, USAGE, explain, run_job
from mellmpi.transport import PeerFailed
from tests.mpi.harness import FLAGS, ROOT, WITHOUT_ULFM
from tests.runtime.planted_everywhere import LIMIT_S, cases, run

EVERY = list(cases())
SAMPLE = EVERY[::17]


@pytest.mark.parametrize("case", SAMPLE, ids=lambda c: f"{c.rank}-{c.site.partition(':')[2]}")
def test_an_error_anywhere_in_start_run_or_end_leaves_no_rank_running(case, tmp_path):
    flags = FLAGS if EVERY.index(case) % 2 else WITHOUT_ULFM
    seen = run(case, tmp_path, flags)
    assert seen.well, seen.output
    assert seen.tracebacks <= 1 and seen.output.count("RuntimeError: planted") <= 2, seen.output


def test_a_process_that_cannot_join_mpi_ends_the_ranks_that_wait_for_it(tmp_path):
    """One host lacks a package, so that its rank never calls MPI_Init."""
    program = (
        "import os, sys; rank = os.environ['OMPI_COMM_WORLD_RANK']; "
        "sys.modules.update({'mpi4py': None} if rank == '2' else {}); "
        "from mellmpi.cli.parser import main; sys.exit(main(['doctor']))"
    )
    started_s = time.monotonic()
    done = subprocess.run(
        [launcher_beside(), *FLAGS, "-n", "4", sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode not in (0, None) and time.monotonic() - started_s < 30 + LIMIT_S
    assert done.stderr.count("mpirun started 4 ranks, but") == 1, done.stderr


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_rank_that_dies_before_mpi_starts_ends_the_others(wrapped):
    program = (
        "import os, sys; sys.exit(3) if os.environ['OMPI_COMM_WORLD_RANK'] == '1' else None; "
        "from mellmpi.cli.parser import main; sys.exit(main(['doctor']))"
    )
    command = [sys.executable, "-c", program]
    if wrapped:
        command = ["bash", "-c", f'"{sys.executable}" -c "$0"; exit $?', program]
    started_s = time.monotonic()
    done = subprocess.run(
        [launcher_beside(), *FLAGS, "-n", "4", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0 and time.monotonic() - started_s < 30 + LIMIT_S
    assert done.stderr.count("a rank has ended before MPI started") == 1, done.stderr


def launcher_beside():
    from tests.mpi.harness import mpirun

    return mpirun()


# --- one process ---------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    """Run a function as the only rank, without MPI."""
    monkeypatch.setattr(ending, "_join", lambda: None)
    return lambda run_rank, reports=True: run_job(run_rank, lambda size: "", reports)


def raises(error):
    def run_rank(job):
        raise error

    return run_rank


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("type this"), USAGE, "mellmpi: type this\n"),
        (KeyboardInterrupt(), INTERRUPTED, "mellmpi: interrupted\n"),
        (PeerFailed(USAGE, "as rank 3 said"), USAGE, "as rank 3 said\n"),
    ],
)
def test_an_error_of_the_user_is_one_line(alone, capsys, error, code, text):
    assert alone(raises(error)) == code
    assert capsys.readouterr().err == text


def test_a_fault_is_a_traceback_and_a_line_with_the_rank(alone, capsys):
    assert alone(raises(ValueError("odd"))) == FAULT
    said = capsys.readouterr().err
    assert said.count("Traceback") == 1 and said.endswith(
        "mellmpi: rank 0 failed: ValueError: odd\n"
    )


def test_only_one_process_of_a_broken_world_reports(alone, capsys):
    assert alone(raises(UsageError("type this")), reports=False) == USAGE
    assert capsys.readouterr().err == ""


def test_a_long_traceback_is_cut_at_its_beginning():
    code, text = explain(ValueError("x" * 100_000), 1)
    assert code == FAULT and len(text) < 140_000 and "rank 1 failed" in text


class Job:
    """Rank 0 of three, whose workers failed during the run."""

    rank, size = 0, 3

    def finish(self):
        return ["worker 1: out of memory"]


@pytest.mark.parametrize(("code", "expected"), [(0, FAULT), (2, 2)])
def test_a_worker_that_fails_at_the_end_is_reported_and_fails_the_job(
    monkeypatch, capsys, code, expected
):
    monkeypatch.setattr(ending, "_join", Job)
    assert run_job(lambda job: code, lambda size: "", True) == expected
    assert capsys.readouterr().err == "worker 1: out of memory\n"


def test_only_a_launcher_is_signalled(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    monkeypatch.setattr(launcher, "GRACE_S", 0.0)
    monkeypatch.setattr(launcher, "launcher_of", lambda: None)
    launcher.end_launcher()
    assert killed == []
    monkeypatch.setattr(launcher, "launcher_of", lambda: 17)
    launcher.end_launcher()
    assert killed == [(17, signal.SIGTERM)]


def test_a_launcher_is_found_among_the_ancestors_by_its_name():
    own = Path(f"/proc/{os.getppid()}/comm").read_text().strip()
    assert launcher.launcher_of((own,)) == os.getppid()
    assert launcher.launcher_of(("no such program",)) is None
