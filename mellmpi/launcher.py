"""Finds and ends the process that started this rank: mpirun, or its daemon on another host.

Needs no MPI: a rank that cannot import it also ends the launcher.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

LAUNCHERS = ("prterun", "mpirun", "orterun", "mpiexec", "mpiexec.hydra")
DAEMONS = ("prted", "orted", "hydra_pmi_proxy")
GRACE_S = 1.0  # for the launcher to end all ranks, this one included
MOST_ANCESTORS = 6  # mpirun may start a script that starts the rank


def launcher_of(names: tuple[str, ...] = LAUNCHERS + DAEMONS) -> int | None:
    """Process id of the nearest ancestor with one of these names; None: there is none."""
    pid = os.getppid()
    for _ in range(MOST_ANCESTORS):
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        name, _, rest = status.partition("(")[2].rpartition(")")
        if name in names:
            return pid
        pid = int(rest.split()[1])
    return None


def ranks_of(launcher: int, job: str) -> int:
    """Number of running child processes of a launcher with this PMIX_NAMESPACE."""
    return sum(f"PMIX_NAMESPACE={job}\0".encode() in env for env in _environments(launcher))


def _environments(launcher: int) -> Iterator[bytes]:
    for children in Path(f"/proc/{launcher}/task").glob("*/children"):
        try:
            pids = children.read_text().split()
        except OSError:
            continue
        for pid in pids:
            try:
                yield Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                continue  # the process has just ended


def end_launcher() -> None:
    """Make the launcher, if there is one, end all processes of the job on all hosts.

    The last resort if ranks do not receive messages: they may be inside MPI_Init, or computing.
    """
    if (launcher := launcher_of()) is not None:
        os.kill(launcher, signal.SIGTERM)
        time.sleep(GRACE_S)
