"""The process that started this rank, mpirun or its daemon on another host, and its other ranks."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

LAUNCHERS = ("prterun", "mpirun", "orterun", "mpiexec", "mpiexec.hydra")
DAEMONS = ("prted", "orted", "hydra_pmi_proxy")
OTHERS_FIRST_S = 1.0
MOST_ANCESTORS = 6  # a rank may be started by a script that mpirun starts


def launcher_of(names: tuple[str, ...] = LAUNCHERS + DAEMONS) -> int | None:
    """Process id of the nearest ancestor that is one of `names`."""
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
    """Processes of a job, by its PMIX_NAMESPACE, that a launcher has started and that still run."""
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
                continue  # it has just ended


def end_launcher() -> None:
    """Ask the launcher to end all processes of the job, on all hosts. Does nothing elsewhere.

    The last resort where ranks cannot be told: they may be inside MPI_Init, or computing.
    """
    if (launcher := launcher_of()) is not None:
        os.kill(launcher, signal.SIGTERM)
        time.sleep(OTHERS_FIRST_S)  # it ends this process as well, unless we leave at once
