"""Moves KV blocks over a channel of non-blocking messages, one message a block."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from mellmpi.transport.base import Arena, Transfer

# Where the receiver copies inside its own progress (CMA), posting a receive may copy the block at
# once. So receives are posted a window at a time, and a progress() call ends after a burst: a
# decode step that is due never waits for more than a burst and a window.
WINDOW_BYTES = 8 << 20  # of one transfer, posted and not yet arrived; at least two blocks
BURST_S = 2e-3


class LinkError(Exception):
    """The peer of a message is lost, or the message was longer than the buffer."""


class Channel(Protocol):
    """Non-blocking messages of bytes in memory. Peers are workers. Raises LinkError."""

    def send(self, address: int, num_bytes: int, dst: int, tag: int) -> Any: ...
    def receive(self, address: int, num_bytes: int, src: int, tag: int) -> Any: ...
    def discard(self, src: int, tag: int) -> Any:
        """A request that receives and forgets the next message; None if none has come."""
        ...

    def test(self, request: Any) -> int | None:
        """Bytes of the message once it is done, else None. Then the request is used up."""
        ...

    def cancel(self, request: Any) -> None:
        """Give a receive up; `test` it as before."""
        ...


class Lane(Protocol):
    """Where the bytes of a block are while they travel."""

    @property
    def block_bytes(self) -> int: ...
    @property
    def send_window(self) -> int | None:
        """Blocks of one transfer that may be posted and not yet sent; None: all of them."""
        ...

    def outgoing(self, block_id: int) -> int:
        """The address to send this block from."""
        ...

    def incoming(self, block_id: int) -> int:
        """The address to receive this block at."""
        ...

    def sent(self, address: int) -> None: ...
    def arrived(self, address: int, block_id: int) -> None: ...


class InPlace:
    """From arena to arena, with no copy of our own."""

    # A receiver with CMA then never waits for the sender's next step.
    send_window = None

    def __init__(self, arena: Arena):
        self.block_bytes = arena.block_bytes
        self._address = arena.address

    def outgoing(self, block_id: int) -> int:
        return self._address + block_id * self.block_bytes

    incoming = outgoing

    def sent(self, address: int) -> None:
        pass

    def arrived(self, address: int, block_id: int) -> None:
        pass


class _Move:
    """One transfer: blocks still to post, then messages in flight, oldest first."""

    def __init__(self, channel: Channel, peer: int, tag: int, block_ids: Sequence[int]):
        self.transfer = Transfer()
        self.peer, self.tag = peer, tag
        self._channel = channel
        self._todo = deque(block_ids)
        self._posted: deque[tuple[Any, int, int]] = deque()  # (request, address, block id)

    @property
    def posting(self) -> bool:
        """Later moves of this peer and tag must hold back, or blocks would change places."""
        return bool(self._todo)

    def drive(self, may_post: bool) -> bool:
        """Take in what is done, post what fits; True if a block was done."""
        moved = self._reap()
        if may_post and self._post_all():
            moved |= self._reap()  # a block that had come already was copied by posting
        if not self._todo and not self._posted and not self.transfer.done:
            self.transfer.end()
        return moved

    def _post_all(self) -> bool:
        posted = False
        try:
            while self._todo and self._post():
                posted = True
        except LinkError:
            self.give_up()
        return posted

    def _reap(self) -> bool:
        moved = False
        while self._posted:
            request, address, block_id = self._posted[0]
            try:
                num_bytes = self._channel.test(request)
            except LinkError:
                self.transfer.fail("peer lost")
                num_bytes = 0
            if num_bytes is None:
                break
            self._posted.popleft()
            self._finish(address, block_id, num_bytes)
            moved = True
        return moved

    def give_up(self) -> None:
        """The peer is lost: post no more. What is posted still ends by itself."""
        self.transfer.fail("peer lost")
        self._todo.clear()

    def _post(self) -> bool:
        raise NotImplementedError

    def _finish(self, address: int, block_id: int, num_bytes: int) -> None:
        self.transfer.num_bytes += num_bytes


class _Sending(_Move):
    def __init__(self, lane: Lane, *args: Any):
        super().__init__(*args)
        self._lane = lane

    def _post(self) -> bool:
        if self._lane.send_window is not None and len(self._posted) >= self._lane.send_window:
            return False
        address, size = self._lane.outgoing(self._todo[0]), self._lane.block_bytes
        request = self._channel.send(address, size, self.peer, self.tag)
        self._posted.append((request, address, self._todo.popleft()))
        return True

    def _finish(self, address: int, block_id: int, num_bytes: int) -> None:
        self._lane.sent(address)
        self.transfer.num_bytes += self._lane.block_bytes


class _Receiving(_Move):
    def __init__(self, lane: Lane, *args: Any):
        super().__init__(*args)
        self._lane = lane
        self._window = max(2, WINDOW_BYTES // lane.block_bytes)

    def _post(self) -> bool:
        if len(self._posted) >= self._window:
            return False
        address, size = self._lane.incoming(self._todo[0]), self._lane.block_bytes
        request = self._channel.receive(address, size, self.peer, self.tag)
        self._posted.append((request, address, self._todo.popleft()))
        return True

    def _finish(self, address: int, block_id: int, num_bytes: int) -> None:
        self._lane.arrived(address, block_id)
        self.transfer.num_bytes += num_bytes
        if num_bytes != self._lane.block_bytes:
            self.transfer.fail("size")

    def give_up(self) -> None:
        super().give_up()
        for request, _, _ in self._posted:
            self._channel.cancel(request)


class _Draining(_Move):
    """One message at a time, of whatever size it is."""

    def _post(self) -> bool:
        if self._posted or (request := self._channel.discard(self.peer, self.tag)) is None:
            return False
        self._posted.append((request, 0, self._todo.popleft()))
        return True


class BlockMover:
    """All transfers of one worker, carried on in turn."""

    def __init__(self, channel: Channel):
        self._channel = channel
        self._lane: Lane | None = None
        self._moves: list[_Move] = []  # oldest first

    @property
    def busy(self) -> bool:
        return bool(self._moves)

    def attach(self, lane: Lane | None) -> None:
        users = [m for m in self._moves if not isinstance(m, _Draining)]
        assert not users, "blocks are under way; the arena cannot go"
        self._lane = lane

    def send(self, dst: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        assert self._lane is not None, "no arena attached"
        return self._begin(_Sending(self._lane, self._channel, dst, tag, block_ids))

    def receive(self, src: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        assert self._lane is not None, "no arena attached"
        return self._begin(_Receiving(self._lane, self._channel, src, tag, block_ids))

    def drain(self, src: int, tag: int, num_blocks: int) -> Transfer:
        return self._begin(_Draining(self._channel, src, tag, range(num_blocks)))

    def _begin(self, move: _Move) -> Transfer:
        if not move.posting:
            move.transfer.end()
            return move.transfer
        self._moves.append(move)
        if isinstance(move, _Sending):
            self._round([m for m in self._moves if isinstance(m, _Sending)])
        return move.transfer

    def progress(self) -> list[int]:
        """Carry all transfers further, for about BURST_S; the peers of those that moved."""
        if not self._moves:
            return []
        moved = peers = self._round(self._moves)
        stop_s = time.perf_counter() + BURST_S
        while moved and self._moves and time.perf_counter() < stop_s:
            moved = self._round(self._moves)
            peers = peers | moved
        return sorted(peers)

    def _round(self, moves: Sequence[_Move]) -> set[int]:
        """Drive each of these moves once; the peers of those that moved."""
        peers, holding = set(), set()
        for move in moves:
            key = (isinstance(move, _Sending), move.peer, move.tag)
            if move.drive(may_post=key not in holding):
                peers.add(move.peer)
            if move.posting:
                holding.add(key)
        self._moves = [m for m in self._moves if not m.transfer.done]
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
