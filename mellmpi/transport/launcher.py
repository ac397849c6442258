"""The process that started this rank: mpirun, or its daemon on another host."""

import os
import signal
import time

LAUNCHERS = ("prterun", "mpirun", "orterun", "mpiexec", "mpiexec.hydra")
DAEMONS = ("prted", "orted", "hydra_pmi_proxy")
OTHERS_FIRST_S = 1.0


def launcher_of(names: tuple[str, ...] = LAUNCHERS) -> int | None:
    """Process id of the parent, if it is one of `names`."""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/comm") as comm:
            return parent if comm.read().strip() in names else None
    except OSError:
        return None


def end_launcher() -> None:
    """Ask the launcher to end all processes of the job, on all hosts. Does nothing elsewhere.

    The last resort where ranks cannot be told: they may be inside MPI_Init, or computing.
    """
    parent = launcher_of(LAUNCHERS + DAEMONS)
    if parent is not None:
        os.kill(parent, signal.SIGTERM)
        time.sleep(OTHERS_FIRST_S)  # it ends this process as well, unless we leave at once
