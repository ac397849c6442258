"""The conformance suite on MPI ranks.

Through the harness: `python -m tests.mpi.conformance DIRECTORY`, on 4 ranks.
By hand: `mpirun -n 4 python -m pytest --with-mpi tests/mpi/conformance.py`.
"""

import atexit
import sys

import pytest

from mellmpi.transport import Transfer, Transport
from mellmpi.transport.mpi import MpiJob
from tests.mpi.harness import leave_verdict, or_abort
from tests.transport.conformance import SCENARIOS
from tests.transport.participant import HostArena, Participant


def connect(job: MpiJob) -> Transport:
    """Arguments: "steps", no progress thread; "messages", no cross-memory reads."""
    return job.connect(
        idle_poll_s=0.005,
        checksums="always",
        progress_thread="steps" not in sys.argv,
        cross_memory="messages" not in sys.argv,
    )


@pytest.fixture(scope="module")
def participant():
    job = MpiJob()
    atexit.register(job.finish)  # pytest-mpi still sends messages at the end
    return Participant(connect(job))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_the_mpi_transport_keeps_the_contract(scenario, participant):
    scenario(participant)
    participant.barrier()


def leave_open(transport: Transport) -> list[Transfer]:
    """Begin transfers that the peer never begins. Returns the receives."""
    peer = transport.worker % transport.num_workers + 1
    receives = [transport.receive_blocks(peer, 98, [0, 1]), transport.drain_blocks(peer, 98, 3)]
    transport.send_blocks(peer, 99, [2, 3])
    transport.progress()
    return receives


def main() -> None:
    job = MpiJob()
    passed: list[str] = []

    def program() -> None:
        transport = connect(job)
        participant = Participant(transport)
        for scenario in SCENARIOS:
            scenario(participant)
            participant.barrier()
            passed.append(scenario.__name__)
            leave_verdict(job.rank, {"passed": passed})
        transport.attach(HostArena(4))
        receives = leave_open(transport)
        job.finish()
        ended = [t.done and t.failed for t in receives]
        leave_verdict(job.rank, {"passed": passed, "finished": True, "ended": ended})

    or_abort(job.rank, job.abort, program)


if __name__ == "__main__":
    main()
