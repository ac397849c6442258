"""The conformance suite on MPI ranks with simulated device arenas.

MPI sends and receives slots in host memory, and copies are delayed as on a device. Through the
harness: `python -m tests.mpi.staged_conformance DIRECTORY`, on 4 ranks.
"""

import ctypes

import numpy as np

from mellmpi.transport import Arena, endpoint
from mellmpi.transport.blocks import Staged
from mellmpi.transport.blocks.staging import StagingBuffer
from tests.transport import block_scenarios
from tests.transport.conformance import SCENARIOS

POLLS = 3  # calls of `done` before a copy is made
# One scenario changes the arena during a transfer, but here slots are sent.
STAGED = [
    scenario
    for scenario in SCENARIOS
    if scenario is not block_scenarios.a_flipped_bit_is_detected_and_affects_no_other_transfer
]


class LateCopies:
    """Copies that are made by the POLLS-th call of `done`."""

    def __init__(self, arena: Arena):
        self._arena = arena
        self._slots: dict[int, np.ndarray] = {}
        self._waiting: dict[int, tuple[int, int, int]] = {}  # slot: (polls left, target, source)

    def new_slot(self) -> int:
        slot = np.full(self._arena.block_bytes, 0xEE, np.uint8)
        self._slots[slot.ctypes.data] = slot
        return slot.ctypes.data

    def to_host(self, block_id: int, address: int) -> None:
        self._begin(address, address, self._block(block_id))

    def to_device(self, block_id: int, address: int) -> None:
        self._begin(address, self._block(block_id), address)

    def _block(self, block_id: int) -> int:
        return self._arena.address + block_id * self._arena.block_bytes

    def _begin(self, slot: int, target: int, source: int) -> None:
        assert slot not in self._waiting, "a slot is used during its copy"
        self._waiting[slot] = (POLLS, target, source)

    def done(self, address: int) -> bool:
        if address not in self._waiting:
            return True
        polls, target, source = self._waiting[address]
        self._waiting[address] = (polls - 1, target, source)
        if polls > 1:
            return False
        ctypes.memmove(target, source, self._arena.block_bytes)
        del self._waiting[address]
        return True


def staging_buffer_for(arena: Arena, device_buffers: bool) -> StagingBuffer:
    return Staged(arena.block_bytes, LateCopies(arena))


if __name__ == "__main__":
    from tests.mpi import conformance  # calls MPI_Init

    endpoint.staging_buffer_for = staging_buffer_for
    conformance.SCENARIOS = STAGED
    conformance.main()
