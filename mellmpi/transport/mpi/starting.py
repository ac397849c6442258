"""Ends a job in which a rank has died before MPI_Init: the other ranks would wait there for it.

With ULFM, mpirun does not end them. A Python thread cannot run during MPI_Init, so a child process
watches the ranks of this host until MPI has started.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from mellmpi.launcher import launcher_of, ranks_of

POLL_S = 0.25
ALL_STARTED_S = 2.0  # after this time the launcher has started all ranks of the host
STAGGER_S = 0.1  # times the local rank: so only the first one reports and ends the job


def watch_start() -> Callable[[], None]:
    """Watch the other ranks of this host. Returns a function to call once MPI has started."""
    job, ranks = os.environ.get("PMIX_NAMESPACE"), os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    launcher = launcher_of()
    if not job or not ranks.isdecimal() or int(ranks) < 2 or launcher is None:
        return lambda: None
    until_closed, open_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(open_end)
        _watch(until_closed, launcher, job, int(ranks))
    os.close(until_closed)

    def started() -> None:
        os.close(open_end)
        os.waitpid(child, 0)

    return started


def _watch(until_closed: int, launcher: int, job: str, ranks: int) -> NoReturn:
    """In the child: end the launcher if a rank is missing. Exits once MPI has started, or when the
    rank exits."""
    try:
        time_s, missing = 0.0, 0
        while not select.select([until_closed], [], [], POLL_S)[0]:
            time_s += POLL_S
            missing = missing + 1 if ranks_of(launcher, job) < ranks else 0
            if time_s > ALL_STARTED_S and missing > 1:
                local_rank = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")
                time.sleep(STAGGER_S * int(local_rank))
                sys.stderr.write(
                    "mellmpi: a rank has ended before MPI started in it; its own "
                    "message, if there is one, is above\n"
                )
                sys.stderr.flush()
                os.kill(launcher, signal.SIGTERM)
                break
    finally:
        os._exit(0)
