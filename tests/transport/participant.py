"""A participant of a scenario, and an arena for its blocks."""

import time
from collections import defaultdict, deque
from typing import Any

import numpy as np

from mellmpi.protocol import Parked, Wake
from mellmpi.transport import Transfer, Transport

LIMIT_S = 20.0  # for one message or transfer; far more than it takes
BLOCK_BYTES = 40_000  # above the eager limit of MPI, and not a multiple of the page size


class HostArena:
    """Blocks in host memory."""

    device = "cpu"

    def __init__(self, num_blocks: int, block_bytes: int = BLOCK_BYTES):
        self.blocks = np.zeros((num_blocks, block_bytes), np.uint8)
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.address = self.blocks.ctypes.data

    def fill(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.blocks[:] = rng.integers(0, 256, self.blocks.shape, np.uint8)


class Participant:
    """One address of a scenario: receives messages one by one, by source."""

    def __init__(self, transport: Transport):
        self.transport = transport
        self._received: dict[int, deque[Any]] = defaultdict(deque)

    def _poll(self) -> None:
        for src, message in self.transport.poll():
            self._received[src].append(message)

    def next(self, src: int) -> Any:
        """The next message from `src`; fails after LIMIT_S."""
        deadline_s = time.monotonic() + LIMIT_S
        while not self._received[src]:
            assert time.monotonic() < deadline_s, f"no message from {src} in {LIMIT_S} s"
            self.transport.progress()
            self.transport.wait(0.05)
            self._poll()
        return self._received[src].popleft()

    def finish(self, *transfers: Transfer) -> None:
        """Drive these transfers to their end."""
        deadline_s = time.monotonic() + LIMIT_S
        while not all(t.done for t in transfers):
            assert time.monotonic() < deadline_s, "a transfer does not end"
            self._poll()
            if not self.transport.progress():
                self.transport.wait(0.05)

    def barrier(self) -> None:
        """Wait until all addresses have called `barrier`."""
        if self.transport.worker == 0:
            workers = range(1, self.transport.num_workers + 1)
            for worker in workers:
                assert isinstance(self.next(worker), Parked)
            for worker in workers:
                self.transport.send(worker, Wake())
        else:
            self.transport.send(0, Parked(0))
            assert isinstance(self.next(0), Wake)
