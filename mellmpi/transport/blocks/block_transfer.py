"""One transfer of blocks over a channel: what is still to be posted, and what is in flight."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mellmpi.transport.base import Transfer
from mellmpi.transport.blocks.cross_memory import CrossMemoryRead, CrossMemoryReads
from mellmpi.transport.blocks.staging import address_of
from mellmpi.transport.channel import Channel, LinkError, Request


@dataclass(frozen=True)
class Route:
    """Peer, tags and channel of a transfer, and the options that both ends share."""

    channel: Channel
    peer: int
    tag: int
    answer_tag: int  # of the receiver's answer
    checked: bool  # every block has a checksum
    reads: CrossMemoryReads


@dataclass(slots=True, eq=False)
class Message:
    """One message in flight, or blocks that are being read instead."""

    num_bytes: int
    address: int = 0
    request: Request | CrossMemoryRead = None
    num_blocks: int = 0
    destinations: tuple[tuple[int, int], ...] = ()  # (block, address) of blocks for the arena
    data: bytearray = field(default_factory=bytearray)  # the buffer, if it is not an arena's


def message_of(data: bytearray) -> Message:
    return Message(len(data), address_of(data), data=data)


class BlockTransfer:
    """A transfer: what is to be posted, in order, and messages in flight, oldest first."""

    is_receive = False
    uses_arena = True

    def __init__(self, route: Route, block_ids: Sequence[int]):
        self.handle = Transfer()
        self.route = route
        self.posting = bool(block_ids)  # later transfers of this peer and tag must not post yet
        self._unposted = deque(block_ids)
        self._in_flight: deque[Message] = deque()
        # Posting of what is not a block. Each returns False if it cannot be done yet.
        self._steps: deque[Callable[[], bool]] = deque()

    @property
    def peer(self) -> int:
        return self.route.peer

    def drive(self, may_post: bool) -> bool:
        """Complete what has finished, post what is possible. Returns whether anything moved."""
        moved = self._reap()
        if may_post and self._post_all():
            moved = True
            self._reap()  # posting copied a block that had already arrived
        ended = not self.posting and not self._in_flight
        if ended and self._copies_done() and not self.handle.done:
            self.handle.end()
        return moved

    def _copies_done(self) -> bool:
        """No copies between arena and staging buffer are in progress; releases their addresses."""
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
        """Do the next step; after the last one there is nothing more to post."""
        if not self._steps[0]():
            return False
        self._steps.popleft()
        self.posting = bool(self._steps)
        return True

    def _reap(self) -> bool:
        """Remove completed messages. Returns whether there were any."""
        moved = False
        while self._in_flight:
            message = self._in_flight[0]
            try:
                num_bytes = self._finished(message.request)
                if num_bytes is None:
                    break
                self._in_flight.popleft()
                self._on_complete(message, num_bytes)
            except LinkError:
                self._in_flight.popleft()
                self.handle.fail("peer lost")
            moved = True
        return moved

    def _finished(self, request: Request | CrossMemoryRead) -> int | None:
        if isinstance(request, CrossMemoryRead):
            return request.finished()
        return self.route.channel.finished(request)

    def give_up(self) -> None:
        """The peer is lost: post nothing more. Messages in flight still complete."""
        self.handle.fail("peer lost")
        self.posting = False

    def _send(self, message: Message, tag: int) -> None:
        route, size = self.route, message.num_bytes
        message.request = route.channel.send(message.address, size, route.peer, tag)
        self._in_flight.append(message)

    def _receive(self, message: Message, tag: int) -> None:
        route, size = self.route, message.num_bytes
        message.request = route.channel.receive(message.address, size, route.peer, tag)
        self._in_flight.append(message)

    def _post(self) -> bool:
        """Post one message; False if none can be posted yet."""
        raise NotImplementedError

    def _on_complete(self, message: Message, num_bytes: int) -> None:
        """A message is complete; `num_bytes`: received (undefined for a send)."""
        raise NotImplementedError
