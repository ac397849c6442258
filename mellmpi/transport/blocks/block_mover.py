"""Moves KV blocks over a channel of non-blocking messages, or lets the receiver read them."""

import time
from collections.abc import Callable, Sequence

from mellmpi.transport.base import Transfer
from mellmpi.transport.blocks.block_transfer import BlockTransfer, Route
from mellmpi.transport.blocks.cross_memory import SHORT_PIECE_BYTES, CrossMemoryReads
from mellmpi.transport.blocks.receiving import Draining, Receiving
from mellmpi.transport.blocks.sending import Offering, Sending
from mellmpi.transport.blocks.staging import StagingBuffer
from mellmpi.transport.channel import Channel

BURST_S = 2e-3  # of one progress(): a decode step that is due waits for no more, see `lanes`


class BlockMover:
    """All transfers of one worker, carried on in turn.

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
        self._lane: StagingBuffer | None = None
        self._moves: list[BlockTransfer] = []  # oldest first
        self.num_ended = 0  # transfers, so far

    @property
    def busy(self) -> bool:
        return bool(self._moves)

    @property
    def reading(self) -> bool:
        """Blocks are being copied right now."""
        return self._reads.under_way

    def attend(self, present: bool) -> None:
        """Whoever calls `progress` will do so soon and often, or no more."""

    def attach(self, lane: StagingBuffer | None) -> None:
        users = [m for m in self._moves if m.uses_arena]
        assert not users, "blocks are under way; the arena cannot go"
        self._lane = lane

    def send(self, dst: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        assert self._lane is not None, "no arena attached"
        kind = Offering if self._lane.can_be_read and self._read_by(dst) else Sending
        return self._begin(kind(self._lane, self._route(dst, tag), block_ids))

    def receive(self, src: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        assert self._lane is not None, "no arena attached"
        return self._begin(Receiving(self._lane, self._route(src, tag), block_ids))

    def drain(self, src: int, tag: int, num_blocks: int) -> Transfer:
        return self._begin(Draining(self._route(src, tag), range(num_blocks)))

    def _route(self, peer: int, tag: int) -> Route:
        # Tags that become one keep apart by their order, which is the same at both ends.
        half = self._channel.num_tags // 2
        tag %= half
        return Route(self._channel, peer, tag, tag + half, self._checked(peer), self._reads)

    def _begin(self, move: BlockTransfer) -> Transfer:
        if not move.posting:
            move.transfer.end()
            return move.transfer
        self._moves.append(move)
        if not move.comes:
            self._round([m for m in self._moves if not m.comes])
        return move.transfer

    def progress(self) -> list[int]:
        """Carry all transfers further, for about BURST_S; the peers of those that moved."""
        if not self._moves:
            return []
        stop_s = time.perf_counter() + BURST_S
        peers = self._burst(stop_s)
        while self._reads.carry_out(SHORT_PIECE_BYTES) and time.perf_counter() < stop_s:
            peers = peers | self._burst(stop_s)
        return sorted(peers)

    def _burst(self, stop_s: float) -> set[int]:
        """Rounds as long as messages move and nothing is to be read; as for `_round`."""
        moved = peers = self._round(self._moves)
        while moved and not self._reads and time.perf_counter() < stop_s:
            moved = self._round(self._moves)
            peers = peers | moved
        return peers

    def _round(self, moves: Sequence[BlockTransfer]) -> set[int]:
        """Drive each of these moves once; the peers of those that moved."""
        peers, holding = set(), set()
        for move in moves:
            key = (move.comes, move.route.peer, move.route.tag)
            if move.drive(may_post=key not in holding):
                peers.add(move.peer)
            if move.posting:
                holding.add(key)
        left = [m for m in self._moves if not m.transfer.done]
        self.num_ended += len(self._moves) - len(left)
        self._moves = left
        return peers

    def forget(self, peer: int) -> None:
        """The peer is lost: its transfers end as failed."""
        for move in self._moves:
            if move.peer == peer:
                move.give_up()
        self._round(self._moves)

    def close(self) -> None:
        """End all transfers that will not end by themselves."""
        for move in self._moves:
            move.give_up()
        self._round(self._moves)
