"""Staging buffers: the memory from which blocks are sent and into which they are received."""

import ctypes
from typing import Protocol

from mellmpi.transport.base import Arena

# Where MPI receives by cross-memory reads (CMA), posting a receive may copy the block at once. So
# receives are posted a window at a time, and a progress() call ends after a burst: a decode step
# that is due waits for one burst and one window at most.
WINDOW_BYTES = 8 << 20  # posted and not complete, of one transfer; at least two blocks


class StagingBuffer(Protocol):
    """Gives each block of an arena an address for messages, and copies it where necessary."""

    @property
    def block_bytes(self) -> int: ...
    @property
    def in_host_memory(self) -> bool:
        """This process can read the blocks at the addresses, and so compute checksums."""
        ...

    @property
    def can_be_read(self) -> bool:
        """Blocks to send are complete at once, and other processes of this host can read them."""
        ...

    @property
    def send_window(self) -> int | None:
        """Blocks of one transfer that may be posted and not yet sent; None: all of them."""
        ...

    def send_address(self, block_id: int) -> int:
        """The address to send this block from, once its copy is done."""
        ...

    def receive_address(self, block_id: int) -> int:
        """The address to receive this block at."""
        ...

    def copy_done(self, address: int) -> bool:
        """No copy from or to this address is in progress."""
        ...

    def received(self, address: int, block_id: int) -> None:
        """The block is at the address; it is in the arena once its copy is done."""
        ...

    def release(self, address: int) -> None:
        """The transfer does not need this address any more."""
        ...


class InPlace:
    """Messages go directly from arena to arena, without a copy of our own."""

    # With all sends posted, a receiver that uses CMA never waits for the sender's next step.
    send_window = None

    def __init__(self, arena: Arena):
        self.block_bytes = arena.block_bytes
        self.in_host_memory = str(arena.device) == "cpu"  # may be a torch.device
        self.can_be_read = self.in_host_memory
        self._arena, self._address = arena, arena.address  # the reference keeps the memory alive

    def send_address(self, block_id: int) -> int:
        return self._address + block_id * self.block_bytes

    receive_address = send_address

    def copy_done(self, address: int) -> bool:
        return True

    def received(self, address: int, block_id: int) -> None:
        pass

    def release(self, address: int) -> None:
        pass


def window(block_bytes: int) -> int:
    """Number of blocks in a window."""
    return max(2, WINDOW_BYTES // block_bytes)


def address_of(data: bytearray) -> int:
    """Address of the first byte; valid as long as the buffer lives and keeps its size."""
    return ctypes.addressof((ctypes.c_char * len(data)).from_buffer(data)) if data else 0


def bytes_at(address: int, num_bytes: int) -> memoryview:
    """View of host memory, not a copy."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")
