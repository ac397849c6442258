"""Runs one rank's part of a job so that an error of any rank ends all ranks, and is said once.

Exit code 2: the user can do something about the error, and one line says what to type. Exit code 1:
a fault, with its traceback.
"""

import logging
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from mellmpi.config import UsageError

USAGE, FAULT, INTERRUPTED = 2, 1, 130  # exit codes
FIRST_SPEAKS_S = 1.0  # rank 0 may have the same error, and ends the job within this time
TEXT_CHARACTERS = 16_000  # longest traceback

log = logging.getLogger(__name__)


class JobFailed(Exception):
    """The job cannot go on, and the user knows why: no traceback."""


def run_job(play: Callable[[Any], int], world_problem: Callable[[int], str], speaks: bool) -> int:
    """Join MPI, play this process's part, and leave together. Returns the exit code.

    play           takes the MPI job (None where there is no MPI); returns an exit code
    world_problem  why a world of so many ranks is not what the user asked for, or ""
    speaks         False: another process of a broken world says what is wrong
    """
    logging.basicConfig(format="mellmpi[%(process)d] %(levelname)s %(name)s: %(message)s")
    logging.getLogger("mellmpi").setLevel(logging.INFO)  # how blocks travel, and how fast
    job = None
    try:
        job = _join()
        if problem := world_problem(job.size if job else 1):
            raise UsageError(problem)
        code = play(job)
        failures = job.finish() if job else []
    except BaseException as error:
        code, text = explain(error, job.rank if job else 0)
        if job is not None and job.size > 1:
            _end_all(job, code, text)
        return _end_alone(code, text, speaks, stray=job is None and bool(world_problem(1)))
    for text in failures:
        _say(text)
    return FAULT if failures and code == 0 else code


def _join() -> Any:
    """The MPI job, or None where there is no MPI: one process can do without."""
    try:
        from mellmpi.transport.mpi import MpiJob
    except (ImportError, RuntimeError) as error:
        log.info("no MPI here (%s): scheduler and worker in one process", error)
        return None
    return MpiJob()


def explain(error: BaseException, rank: int) -> tuple[int, str]:
    """Exit code and text for the user: one line, or a traceback and one line."""
    if isinstance(error, UsageError):
        return USAGE, f"mellmpi: {error}"
    if isinstance(error, JobFailed):
        return FAULT, f"mellmpi: {error}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "mellmpi: interrupted"
    if hasattr(error, "exit_code"):  # PeerFailed: another rank has explained
        return error.exit_code, str(error)
    lines = "".join(traceback.format_exception(error))[-TEXT_CHARACTERS:]
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    return FAULT, f"{lines}mellmpi: rank {rank} failed: {last}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _end_all(job: Any, code: int, text: str) -> None:
    if job.rank == 0:
        _say(text)
        job.abort(code)
    job.fail(code, text)


def _end_alone(code: int, text: str, speaks: bool, stray: bool) -> int:
    """`stray`: this rank could not join MPI, and the other ranks may be waiting there for it."""
    if stray and not speaks:
        time.sleep(FIRST_SPEAKS_S)
    if speaks or stray:
        _say(text)
    if stray:
        from mellmpi.transport.mpi import end_launcher

        end_launcher()
    return code
