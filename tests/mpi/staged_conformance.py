"""The conformance suite on MPI ranks whose arenas pretend to be a device's: what MPI sends and
receives is in slots beside them, and copies are made late, as a device makes them.

Through the harness: `python -m tests.mpi.staged_conformance DIRECTORY`, on 4 ranks.
"""

import ctypes

import numpy as np

from mellmpi.transport import Arena, endpoint
from mellmpi.transport.blocks import Staged
from mellmpi.transport.blocks.staging import Lane
from tests.transport.conformance import (
    SCENARIOS,
    a_bit_that_flips_on_the_way_is_found_and_no_other_transfer_suffers,
)

LOOKS = 3  # at a slot, before its copy is made
# All but one that spoils an arena while it is being sent: what is sent lies elsewhere here.
STAGED = [
    scenario
    for scenario in SCENARIOS
    if scenario is not a_bit_that_flips_on_the_way_is_found_and_no_other_transfer_suffers
]


class LateCopies:
    """Copies that are made when somebody has asked after them often enough."""

    def __init__(self, arena: Arena):
        self._arena = arena
        self._slots: dict[int, np.ndarray] = {}
        self._waiting: dict[int, tuple[int, int, int]] = {}  # slot: (looks left, target, source)

    def host_slot(self) -> int:
        slot = np.full(self._arena.block_bytes, 0xEE, np.uint8)
        self._slots[slot.ctypes.data] = slot
        return slot.ctypes.data

    def out(self, block_id: int, address: int) -> None:
        self._begin(address, address, self._block(block_id))

    def into(self, block_id: int, address: int) -> None:
        self._begin(address, self._block(block_id), address)

    def _block(self, block_id: int) -> int:
        return self._arena.address + block_id * self._arena.block_bytes

    def _begin(self, slot: int, target: int, source: int) -> None:
        assert slot not in self._waiting, "a slot is used while it is being copied"
        self._waiting[slot] = (LOOKS, target, source)

    def done(self, address: int) -> bool:
        if address not in self._waiting:
            return True
        looks, target, source = self._waiting[address]
        self._waiting[address] = (looks - 1, target, source)
        if looks > 1:
            return False
        ctypes.memmove(target, source, self._arena.block_bytes)
        del self._waiting[address]
        return True


def lane_for(arena: Arena, device_buffers: bool) -> Lane:
    return Staged(arena.block_bytes, LateCopies(arena))


if __name__ == "__main__":
    from tests.mpi import conformance  # starts MPI

    endpoint.lane_for = lane_for
    conformance.SCENARIOS = STAGED
    conformance.main()
