"""Worker 3 of 4 is killed while messages and blocks are in flight.

`python -m tests.mpi.lost_worker DIRECTORY [messages]`, on 5 ranks under ULFM.
"""

import os
import signal
import sys
import time
from collections import Counter
from typing import Any

import numpy as np

from mellmpi.protocol import Cancel, WorkerLost
from mellmpi.transport import Transport
from mellmpi.transport.mpi import MpiJob
from tests.mpi.harness import leave_verdict, or_abort, until_verdicts
from tests.transport.participant import LIMIT_S, HostArena, Participant

VICTIM = 3
NUM_BLOCKS, BLOCK_BYTES = 64, 300_000


def die(transport: Transport) -> None:
    """Send one of two transfers that are awaited, then be killed during both."""
    arena = HostArena(NUM_BLOCKS, BLOCK_BYTES)
    transport.attach(arena)
    Participant(transport).next(0)
    for i in range(100):
        transport.send(0, Cancel(i, "gone"))
    transport.send_blocks(2, 5, range(NUM_BLOCKS // 2))
    transport.receive_blocks(1, 6, range(NUM_BLOCKS // 2, NUM_BLOCKS))
    stop_s = time.monotonic() + 0.02
    while time.monotonic() < stop_s:
        transport.progress()
    os.kill(os.getpid(), signal.SIGKILL)


class Survivor:
    """Counts the messages that it receives."""

    def __init__(self, transport: Transport):
        self.transport = transport
        self.received: Counter[int] = Counter()
        self.in_order = True
        self.lost: list[int] = []
        self.after_the_loss = 0  # messages of the victim after the report of its loss

    def poll(self) -> None:
        for src, message in self.transport.poll():
            if isinstance(message, WorkerLost):
                assert src == message.worker
                self.lost.append(message.worker)
            else:
                self.in_order &= message.request_id == self.received[src]
                self.received[src] += 1
                self.after_the_loss += src in self.lost
        self.transport.progress()
        self.transport.wait(0.01)

    def until(self, condition: Any) -> None:
        stop_s = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < stop_s, f"lost {self.lost}, received {self.received}"
            self.poll()


def survive(transport: Transport) -> dict[str, Any]:
    """Check that transfers with the victim end, and that those of other workers go on."""
    me, survivor = transport.worker, Survivor(transport)
    arena = HostArena(2 * NUM_BLOCKS, BLOCK_BYTES)
    arena.fill(me)
    transport.attach(arena)
    doomed = []
    if me == 0:
        transport.send(VICTIM, Cancel(0, "gone"))
    if me == 1:
        transport.send_blocks(VICTIM, 6, range(NUM_BLOCKS // 2))
        doomed = [transport.send_blocks(VICTIM, 9, range(NUM_BLOCKS // 2))]
    if me == 2:
        transport.receive_blocks(VICTIM, 5, range(NUM_BLOCKS // 2))
        doomed = [transport.receive_blocks(VICTIM, 10, range(NUM_BLOCKS // 2, NUM_BLOCKS))]
    if me == 4:
        doomed = [transport.drain_blocks(VICTIM, 5, 1)]
    survivor.until(lambda: survivor.lost and all(t.done for t in doomed))
    late = [transport.send_blocks(VICTIM, 7, [0]), transport.receive_blocks(VICTIM, 7, [1])]
    transport.send(VICTIM, Cancel(1, "gone"))
    survivor.until(lambda: all(t.done for t in late))
    exchange(survivor, arena)
    return {
        "lost": survivor.lost,
        "doomed_failed": [t.reason for t in doomed],
        "late_failed": [t.reason for t in late],
        "heard": dict(survivor.received),
        "in_order": survivor.in_order,
        "after_the_loss": survivor.after_the_loss,
    }


def exchange(survivor: Survivor, arena: HostArena) -> None:
    """Send messages and blocks between the surviving ranks after the loss."""
    transport, me = survivor.transport, survivor.transport.worker
    others = [w for w in range(transport.num_workers + 1) if w not in (me, VICTIM)]
    if me == 1:
        transfers = [transport.send_blocks(2, 8, range(NUM_BLOCKS))]
    elif me == 2:
        transfers = [transport.receive_blocks(1, 8, range(NUM_BLOCKS, 2 * NUM_BLOCKS))]
    else:
        transfers = []
    for dst in others:
        for i in range(50):
            transport.send(dst, Cancel(i, "gone"))
    survivor.until(lambda: all(t.done for t in transfers))
    survivor.until(lambda: all(survivor.received[w] >= 50 for w in others))
    assert not any(t.failed for t in transfers)
    if me == 2:
        sent = HostArena(2 * NUM_BLOCKS, BLOCK_BYTES)
        sent.fill(1)
        assert np.array_equal(arena.blocks[NUM_BLOCKS:], sent.blocks[:NUM_BLOCKS])


def main() -> None:
    job = MpiJob()

    def program() -> None:
        transport = job.connect(idle_poll_s=0.005, cross_memory="messages" not in sys.argv)
        if transport.worker == VICTIM:
            die(transport)
        verdict = survive(transport)
        leave_verdict(job.rank, verdict)
        until_verdicts(job.size - 1, transport.poll)
        started_s = time.monotonic()
        job.finish()
        leave_verdict(job.rank, verdict | {"finish_s": time.monotonic() - started_s})

    or_abort(job.rank, job.abort, program)


if __name__ == "__main__":
    main()
