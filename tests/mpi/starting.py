"""The start of a job, abort, and lost ranks: `python -m tests.mpi.starting DIRECTORY CASE`."""

import sys
import time
from typing import Any

from mellmpi.protocol import FINGERPRINT, WorkerLost
from mellmpi.transport.mpi import MixedInstallation, MpiJob, set_yielding
from tests.mpi.harness import leave_verdict, or_abort, until_verdicts
from tests.transport.participant import LIMIT_S


def share(job: MpiJob) -> Any:
    """Share data and check the installation, the second time with another version on rank 2."""
    data = {"config": {"threads": None, "share": 0.5}, "names": ["a", "b"]}
    shared = job.share(data if job.rank == 0 else None)
    job.check_installation()
    try:
        job.check_installation(FINGERPRINT[::-1] if job.rank == 2 else FINGERPRINT)
        refusal = ""
    except MixedInstallation as error:
        refusal = str(error)
    transport = job.connect(idle_poll_s=0.005)
    verdict = {
        "shared": shared == data,
        "local_ranks": job.local_ranks,
        "num_hosts": len(job.hosts),
        "refusal": refusal,
        "worker": transport.worker,
        "num_workers": transport.num_workers,
        "yields": set_yielding(False),
    }
    job.finish()
    return verdict


def await_loss(job: MpiJob) -> Any:
    """Wait for the loss of a rank. Returns which rank was lost."""
    transport = job.connect(idle_poll_s=0.005)
    stop_s = time.monotonic() + LIMIT_S
    while time.monotonic() < stop_s:
        for _, message in transport.poll():
            assert isinstance(message, WorkerLost)
            leave_verdict(job.rank, {"lost": message.worker})
            if message.worker == 0:
                job.vanish(9)
            until_verdicts(job.size - 1)
            job.finish()
            return {"lost": message.worker, "finished": True}
        transport.wait(1.0)
    raise AssertionError("no rank was lost")


def main() -> None:
    job, case = MpiJob(), sys.argv[2]

    def program() -> None:
        if case == "alone":
            leave_verdict(job.rank, {"size": job.size})  # without `finish`
        elif case == "share":
            leave_verdict(job.rank, share(job))
        elif case == "abort" and job.rank == 0:
            job.connect(idle_poll_s=0.005)
            job.abort(7)
        elif (case, job.rank) in (("vanish", 1), ("orphans", 0)):
            job.connect(idle_poll_s=0.005)
            job.vanish(8)
        else:
            leave_verdict(job.rank, await_loss(job))

    or_abort(job.rank, job.abort, program)


if __name__ == "__main__":
    main()
