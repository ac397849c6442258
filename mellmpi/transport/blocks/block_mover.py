"""Moves KV blocks over a channel of non-blocking messages, or lets the receiver read them."""

import time
from collections.abc import Callable, Sequence

from mellmpi.transport.base import Transfer
from mellmpi.transport.blocks.block_transfer import BlockTransfer, Route
from mellmpi.transport.blocks.cross_memory import SHORT_PIECE_BYTES, CrossMemoryReads
from mellmpi.transport.blocks.receiving import Drain, Receive
from mellmpi.transport.blocks.sending import CrossMemorySend, MessageSend
from mellmpi.transport.blocks.staging import StagingBuffer
from mellmpi.transport.channel import Channel

BURST_S = 2e-3  # of one progress(): a decode step that is due waits no longer, see `staging`


class BlockMover:
    """All transfers of one worker; `progress` advances each of them.

    checked  whether blocks to or from this peer have checksums; the same at both ends
    read_by  whether this peer can read our memory, and does
    """

    def __init__(
        self,
        channel: Channel,
        checked: Callable[[int], bool] = lambda _: False,
        read_by: Callable[[int], bool] = lambda _: False,
    ):
        self._channel, self._checked, self._read_by = channel, checked, read_by
        self._reads = CrossMemoryReads()
        self._staging: StagingBuffer | None = None
        self._transfers: list[BlockTransfer] = []  # oldest first
        self.num_ended = 0  # transfers, so far

    @property
    def busy(self) -> bool:
        return bool(self._transfers)

    @property
    def reading(self) -> bool:
        """Blocks are being read from the memory of another process right now."""
        return self._reads.in_progress

    def set_polling(self, polling: bool) -> None:
        """Tell the mover whether its caller will call `progress` soon and often from now on."""

    def attach(self, staging: StagingBuffer | None) -> None:
        users = [transfer for transfer in self._transfers if transfer.uses_arena]
        assert not users, "transfers in progress use the arena"
        self._staging = staging

    def send(self, dst: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        assert self._staging is not None, "no arena attached"
        by_reads = self._staging.can_be_read and self._read_by(dst)
        kind = CrossMemorySend if by_reads else MessageSend
        return self._begin(kind(self._staging, self._route(dst, tag), block_ids))

    def receive(self, src: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        assert self._staging is not None, "no arena attached"
        return self._begin(Receive(self._staging, self._route(src, tag), block_ids))

    def drain(self, src: int, tag: int, num_blocks: int) -> Transfer:
        return self._begin(Drain(self._route(src, tag), range(num_blocks)))

    def _route(self, peer: int, tag: int) -> Route:
        # Tags that become equal are told apart by their order, which is the same at both ends.
        half = self._channel.num_tags // 2
        tag %= half
        return Route(self._channel, peer, tag, tag + half, self._checked(peer), self._reads)

    def _begin(self, transfer: BlockTransfer) -> Transfer:
        if not transfer.posting:
            transfer.handle.end()
            return transfer.handle
        self._transfers.append(transfer)
        if not transfer.is_receive:
            self._round([other for other in self._transfers if not other.is_receive])
        return transfer.handle

    def progress(self) -> list[int]:
        """Advance all transfers for about BURST_S. Returns the peers of those that moved."""
        if not self._transfers:
            return []
        stop_s = time.perf_counter() + BURST_S
        peers = self._burst(stop_s)
        while self._reads.copy_piece(SHORT_PIECE_BYTES) and time.perf_counter() < stop_s:
            peers = peers | self._burst(stop_s)
        return sorted(peers)

    def _burst(self, stop_s: float) -> set[int]:
        """Make rounds while messages move and nothing is to be read; returns as `_round`."""
        moved = peers = self._round(self._transfers)
        while moved and not self._reads and time.perf_counter() < stop_s:
            moved = self._round(self._transfers)
            peers = peers | moved
        return peers

    def _round(self, transfers: Sequence[BlockTransfer]) -> set[int]:
        """Drive each of these transfers once. Returns the peers of those that moved."""
        peers, still_posting = set(), set()
        for transfer in transfers:
            key = (transfer.is_receive, transfer.route.peer, transfer.route.tag)
            if transfer.drive(may_post=key not in still_posting):
                peers.add(transfer.peer)
            if transfer.posting:
                still_posting.add(key)
        remaining = [transfer for transfer in self._transfers if not transfer.handle.done]
        self.num_ended += len(self._transfers) - len(remaining)
        self._transfers = remaining
        return peers

    def drop_peer(self, peer: int) -> None:
        """The peer is lost: its transfers end as failed."""
        for transfer in self._transfers:
            if transfer.peer == peer:
                transfer.give_up()
        self._round(self._transfers)

    def close(self) -> None:
        """Give up all transfers that have not ended."""
        for transfer in self._transfers:
            transfer.give_up()
        self._round(self._transfers)
