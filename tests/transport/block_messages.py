"""The messages of block transfers on a FakeChannel."""

from mellmpi.transport.blocks.framing import TransferHeader, pack_numbers
from mellmpi.transport.blocks.staging import WINDOW_BYTES
from tests.transport.fakes import FakeChannel

BLOCK_BYTES = 2 << 20
WINDOW = WINDOW_BYTES // BLOCK_BYTES
HALF = FakeChannel.num_tags // 2  # answers have the upper half of the tags


def progress_until_done(mover, *transfers):
    """Call `progress` until these transfers have ended."""
    for _ in range(1000):  # a call may end early, after BURST_S
        if all(transfer.done for transfer in transfers):
            return
        mover.progress()
    raise AssertionError("a transfer does not end")


def complete_sends(channel):
    for request in channel.pending("send"):
        request.done = True


def answer(channel, peer, tag):
    channel.waiting[peer, tag + HALF].append(b"x")


def header(num_blocks, block_bytes=BLOCK_BYTES, checked=False):
    return bytes(TransferHeader(num_blocks, block_bytes, checked).pack())


def deliver(channel, src, tag, num_blocks, first=0, sums=None):
    """All messages of a transfer, with these checksums if any."""
    channel.waiting[src, tag].append(header(num_blocks, checked=sums is not None))
    for i in range(first, first + num_blocks):
        channel.waiting[src, tag].append(bytes([i + 1]) * BLOCK_BYTES)
    if sums is not None:
        channel.waiting[src, tag].append(bytes(pack_numbers(sums)))
