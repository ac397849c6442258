"""What frames the blocks of one transfer on their channel: an opening before, checksums behind.

Once it has read the opening a receiver knows what follows: it can post its receives ahead, throws
away what it did not expect, and never looks for an end. Where it can read the sender's memory the
opening says where the blocks are, and no message brings them.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

# Two ends that do not agree on what comes next find out here.
MAGIC = bytes.fromhex("284b639878543b717f80ecf4dd8e7404")
_HEAD = struct.Struct("<16sQQ?q")


@dataclass(frozen=True, slots=True)
class TransferHeader:
    """Blocks of equal size follow, and the checksum of each if they are checked."""

    num_blocks: int
    block_bytes: int
    checked: bool
    pid: int | None = None  # of the sender, where its blocks are to be read; None: they are sent
    addresses: tuple[int, ...] = ()  # of the blocks there

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def pack(self) -> bytearray:
        head = _HEAD.pack(MAGIC, self.num_blocks, self.block_bytes, self.checked, self.pid or 0)
        return bytearray(head) + pack_numbers(self.addresses)


def unpack_opening(data: bytes | bytearray) -> TransferHeader:
    """AssertionError if this is none: nobody could tell what follows it."""
    assert len(data) >= _HEAD.size and data[:16] == MAGIC, "blocks without an opening"
    _, num_blocks, block_bytes, checked, pid = _HEAD.unpack_from(data)
    addresses = struct.unpack_from(f"<{num_blocks}Q", data, _HEAD.size) if pid else ()
    return TransferHeader(num_blocks, block_bytes, checked, pid or None, addresses)


def checksum(data: memoryview) -> int:
    """Of one block (xxh3, 64 bits: some 25 GB/s on one core)."""
    return xxhash.xxh3_64_intdigest(data)


def pack_numbers(numbers: Sequence[int]) -> bytearray:
    """8 bytes each: addresses, or checksums."""
    return bytearray(struct.pack(f"<{len(numbers)}Q", *numbers))
