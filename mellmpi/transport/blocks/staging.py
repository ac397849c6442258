"""Where the bytes of a block are while they travel."""

import ctypes
from typing import Protocol

from mellmpi.transport.base import Arena

# Where the receiver copies inside its own progress (CMA), to begin a receive may copy the block at
# once. So receives are begun a window at a time, and a progress() call ends after a burst: a
# decode step that is due never waits for more than a burst and a window.
WINDOW_BYTES = 8 << 20  # of one transfer, begun and not yet done; at least two blocks


class StagingBuffer(Protocol):
    """From an arena to messages and back."""

    @property
    def block_bytes(self) -> int: ...
    @property
    def in_host_memory(self) -> bool:
        """What travels can be read here, and so be checked."""
        ...

    @property
    def can_be_read(self) -> bool:
        """What is outgoing lies still at once, where processes of this host can read it."""
        ...

    @property
    def send_window(self) -> int | None:
        """Blocks of one transfer that may be posted and not yet sent; None: all of them."""
        ...

    def outgoing(self, block_id: int) -> int:
        """The address to send this block from, once it is `still`."""
        ...

    def incoming(self, block_id: int) -> int:
        """The address to receive this block at."""
        ...

    def still(self, address: int) -> bool:
        """No copy from or to this address is under way."""
        ...

    def arrived(self, address: int, block_id: int) -> None:
        """It has been received; it is in its place once it is `still`."""
        ...

    def free(self, address: int) -> None:
        """The transfer needs this address no more."""
        ...


class InPlace:
    """From arena to arena, with no copy of our own."""

    # A receiver with CMA then never waits for the sender's next step.
    send_window = None

    def __init__(self, arena: Arena):
        self.block_bytes = arena.block_bytes
        self.in_host_memory = str(arena.device) == "cpu"  # torch gives a device, not its name
        self.can_be_read = self.in_host_memory
        self._arena, self._address = arena, arena.address  # the first keeps the memory alive

    def outgoing(self, block_id: int) -> int:
        return self._address + block_id * self.block_bytes

    incoming = outgoing

    def still(self, address: int) -> bool:
        return True

    def arrived(self, address: int, block_id: int) -> None:
        pass

    def free(self, address: int) -> None:
        pass


def window(block_bytes: int) -> int:
    """Blocks in a window."""
    return max(2, WINDOW_BYTES // block_bytes)


def address_of(data: bytearray) -> int:
    """Of its first byte; valid as long as the buffer lives and keeps its size."""
    return ctypes.addressof((ctypes.c_char * len(data)).from_buffer(data)) if data else 0


def bytes_at(address: int, num_bytes: int) -> memoryview:
    """Host memory as Python sees it, not copied."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")
