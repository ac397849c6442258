"""Measures links of 4 workers on 3 simulated hosts.

`python -m tests.mpi.links DIRECTORY [lose] [messages]`, on 5 ranks. lose: worker 2 is killed before
it measures anything; messages: without cross-memory reads.
"""

import os
import signal
import sys
import time

from mellmpi.transport.mpi import MpiJob
from mellmpi.transport.probes import measure_links
from tests.mpi.harness import leave_verdict, or_abort

HOSTS = ["a", "a", "b", "c", "c"]


def main() -> None:
    job = MpiJob()

    def program() -> None:
        transport = job.connect(idle_poll_s=0.005, cross_memory="messages" not in sys.argv)
        if "lose" in sys.argv and transport.worker == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        started_s = time.monotonic()
        links = measure_links(transport, HOSTS)
        verdict = {"took_s": time.monotonic() - started_s, "measured": links is not None}
        if links is not None:
            verdict |= {"pairs": list(zip(links.srcs, links.dsts, strict=True))}
        verdict["after"] = [type(m).__name__ for _, m in transport.poll()]
        leave_verdict(job.rank, verdict)
        job.finish()

    or_abort(job.rank, job.abort, program)


if __name__ == "__main__":
    main()
