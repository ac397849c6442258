"""Runs one rank of a job so that an error of any rank ends all ranks, and is printed once.

Exit code 2: an error of the user; one line says what to type. Exit code 1: a fault, with its
traceback.
"""

import logging
import sys
import time
import traceback
from collections.abc import Callable

from mellmpi.config import UsageError
from mellmpi.runtime.job import Job

USAGE, FAULT, INTERRUPTED = 2, 1, 130  # exit codes
RANK_0_FIRST_S = 1.0  # rank 0 may have the same error, and then ends the job within this time
TEXT_CHARACTERS = 16_000  # of the longest traceback

log = logging.getLogger(__name__)


class JobFailed(Exception):
    """The job cannot continue. The text explains why, so that no traceback is printed."""


def run_job(
    run_rank: Callable[[Job | None], int], world_problem: Callable[[int], str], reports: bool
) -> int:
    """Join MPI, run this rank, and leave MPI together with the others. Returns the exit code.

    run_rank       takes the MPI job (None without MPI); returns an exit code
    world_problem  number of ranks -> why the user did not ask for this number, or ""
    reports        False: another process reports the problem of the world
    """
    logging.basicConfig(format="mellmpi[%(process)d] %(levelname)s %(name)s: %(message)s")
    logging.getLogger("mellmpi").setLevel(logging.INFO)  # how blocks travel, and how fast
    job = None
    try:
        job = _join()
        if problem := world_problem(job.size if job else 1):
            raise UsageError(problem)
        code = run_rank(job)
        failures = job.finish() if job else []
    except BaseException as error:
        code, text = explain(error, job.rank if job else 0)
        if job is not None and job.size > 1:
            _end_all(job, code, text)
        return _end_single(code, text, reports, stray=job is None and bool(world_problem(1)))
    for text in failures:
        _print(text)
    return FAULT if failures and code == 0 else code


def _join() -> Job | None:
    """Return the MPI job, or None without MPI: a single process does not need it."""
    try:
        from mellmpi.transport.mpi import MpiJob
    except (ImportError, RuntimeError) as error:
        log.info("no MPI here (%s): scheduler and worker in one process", error)
        return None
    return MpiJob()


def explain(error: BaseException, rank: int) -> tuple[int, str]:
    """Return the exit code and the text for the user: one line, or a traceback and one line."""
    if isinstance(error, UsageError):
        return USAGE, f"mellmpi: {error}"
    if isinstance(error, JobFailed):
        return FAULT, f"mellmpi: {error}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "mellmpi: interrupted"
    if hasattr(error, "exit_code"):  # PeerFailed: another rank has explained its error
        return error.exit_code, str(error)
    lines = "".join(traceback.format_exception(error))[-TEXT_CHARACTERS:]
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    return FAULT, f"{lines}mellmpi: rank {rank} failed: {last}"


def _print(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _end_all(job: Job, code: int, text: str) -> None:
    if job.rank == 0:
        _print(text)
        job.abort(code)
    job.fail(code, text)


def _end_single(code: int, text: str, reports: bool, stray: bool) -> int:
    """`stray`: this rank could not join MPI, and the other ranks may be waiting for it there."""
    if stray and not reports:
        time.sleep(RANK_0_FIRST_S)
    if reports or stray:
        _print(text)
    if stray:
        from mellmpi.launcher import end_launcher

        end_launcher()
    return code
