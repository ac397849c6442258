"""One transfer of blocks over a channel: what is to be posted, and what is in flight."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mellmpi.transport.base import Transfer
from mellmpi.transport.blocks.cross_memory import CrossMemoryRead, CrossMemoryReads
from mellmpi.transport.blocks.staging import address_of
from mellmpi.transport.channel import Channel, LinkError


@dataclass(frozen=True)
class Route:
    """Which messages belong to a transfer, and how they are treated."""

    channel: Channel
    peer: int
    tag: int
    answer_tag: int  # of what goes the other way
    checked: bool  # every block has a checksum
    reads: CrossMemoryReads


@dataclass(slots=True, eq=False)
class Message:
    """One message in flight, or blocks that are being read instead."""

    num_bytes: int
    address: int = 0
    request: Any = None
    num_blocks: int = 0
    places: tuple[tuple[int, int], ...] = ()  # (block, address) of those that go to an arena
    data: bytearray = field(default_factory=bytearray)  # in place of an arena's memory


def message_of(data: bytearray) -> Message:
    return Message(len(data), address_of(data), data=data)


class BlockTransfer:
    """A transfer: blocks still to come, then messages in flight, oldest first."""

    comes = False  # from the peer
    uses_arena = True

    def __init__(self, route: Route, block_ids: Sequence[int]):
        self.transfer = Transfer()
        self.route = route
        self.posting = bool(block_ids)  # later moves of this peer and tag must hold back
        self._todo = deque(block_ids)
        self._flying: deque[Message] = deque()
        self._steps: deque[Callable[[], bool]] = deque()  # beside the blocks; False: not yet

    @property
    def peer(self) -> int:
        return self.route.peer

    def drive(self, may_post: bool) -> bool:
        """Take in what is done, post what fits; True if there was anything."""
        moved = self._reap()
        if may_post and self._post_all():
            moved = True
            self._reap()  # a block that had come already was copied by posting
        if not self.posting and not self._flying and self._settled() and not self.transfer.done:
            self.transfer.end()
        return moved

    def _settled(self) -> bool:
        """No copy of our own is under way."""
        return True

    def _post_all(self) -> bool:
        posted = False
        try:
            while self.posting and self._post():
                posted = True
        except LinkError:
            self.give_up()
        return posted

    def _take_step(self) -> bool:
        """The next of the steps; after the last of them there is no more to post."""
        if not self._steps[0]():
            return False
        self._steps.popleft()
        self.posting = bool(self._steps)
        return True

    def _reap(self) -> bool:
        moved = False
        while self._flying:
            message = self._flying[0]
            try:
                num_bytes = self._finished(message.request)
                if num_bytes is None:
                    break
                self._flying.popleft()
                self._finish(message, num_bytes)
            except LinkError:
                self._flying.popleft()
                self.transfer.fail("peer lost")
            moved = True
        return moved

    def _finished(self, request: Any) -> int | None:
        if isinstance(request, CrossMemoryRead):
            return request.finished()
        return self.route.channel.finished(request)

    def give_up(self) -> None:
        """The peer is lost: post no more. What is in flight still ends by itself."""
        self.transfer.fail("peer lost")
        self.posting = False

    def _send(self, message: Message, tag: int) -> None:
        route, size = self.route, message.num_bytes
        message.request = route.channel.send(message.address, size, route.peer, tag)
        self._flying.append(message)

    def _receive(self, message: Message, tag: int) -> None:
        route, size = self.route, message.num_bytes
        message.request = route.channel.receive(message.address, size, route.peer, tag)
        self._flying.append(message)

    def _post(self) -> bool:
        raise NotImplementedError

    def _finish(self, message: Message, num_bytes: int) -> None:
        """num_bytes: that came, of a message that was received."""
        raise NotImplementedError
