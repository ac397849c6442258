"""One transfer of blocks over a channel: a window at a time, one message a block."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mellmpi.transport import trailer
from mellmpi.transport.base import Transfer
from mellmpi.transport.channel import Channel, LinkError
from mellmpi.transport.lanes import Lane, address_of, bytes_at, window


@dataclass(frozen=True)
class Route:
    """Which messages belong to a transfer, and how they are treated."""

    channel: Channel
    peer: int
    tag: int
    checked: bool  # every block has a checksum


@dataclass(slots=True)
class Message:
    """One message in flight."""

    request: Any
    num_bytes: int
    address: int = 0
    block_id: int | None = None  # None: no block of the arena
    data: bytearray = field(default_factory=bytearray)  # in place of an arena's memory


class Move:
    """A transfer: blocks still to come, then messages in flight, oldest first."""

    def __init__(self, route: Route, block_ids: Sequence[int]):
        self.transfer = Transfer()
        self.route = route
        self.posting = bool(block_ids)  # later moves of this peer and tag must hold back
        self._todo = deque(block_ids)
        self._flying: deque[Message] = deque()

    @property
    def peer(self) -> int:
        return self.route.peer

    def drive(self, may_post: bool) -> bool:
        """Take in what is done, post what fits; True if a message was done."""
        moved = self._reap()
        if may_post and self._post_all():
            moved |= self._reap()  # a block that had come already was copied by posting
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

    def _reap(self) -> bool:
        moved = False
        while self._flying:
            try:
                if not self.route.channel.test(self._flying[0].request):
                    break
                self._finish(self._flying.popleft())
            except LinkError:
                self._flying.popleft()
                self.transfer.fail("peer lost")
            moved = True
        return moved

    def give_up(self) -> None:
        """The peer is lost: post no more. What is in flight still ends by itself."""
        self.transfer.fail("peer lost")
        self.posting = False

    def _post(self) -> bool:
        raise NotImplementedError

    def _finish(self, message: Message) -> None:
        raise NotImplementedError


class Sending(Move):
    """Blocks of an arena, then the trailer."""

    def __init__(self, lane: Lane, route: Route, block_ids: Sequence[int]):
        super().__init__(route, block_ids)
        self._lane, self._num_blocks = lane, len(block_ids)
        self._checked = route.checked and lane.in_host_memory
        self._checksums: list[int] = []
        self._staged: deque[Message] = deque()  # being copied to where they are sent from
        # Checksums take time: a window of them before somebody else has a turn.
        self._window = window(lane.block_bytes) if self._checked else lane.send_window

    def _post(self) -> bool:
        self._stage()
        if not self._staged and self._todo:
            return False  # the window is full
        if self._staged and not self._lane.still(self._staged[0].address):
            return False
        message = self._staged[0] if self._staged else self._trailer()
        if self._checked and message.block_id is not None:
            data = bytes_at(message.address, message.num_bytes)
            self._checksums.append(trailer.checksum(data))
        route, size = self.route, message.num_bytes
        message.request = route.channel.send(message.address, size, route.peer, route.tag)
        self._flying.append(message)
        if self._staged:
            self._staged.popleft()
        else:
            self.posting = False
        return True

    def _stage(self) -> None:
        room = 1 if self._window is None else self._window - len(self._flying)
        while self._todo and len(self._staged) < room:
            block_id = self._todo.popleft()
            address = self._lane.outgoing(block_id)
            self._staged.append(Message(None, self._lane.block_bytes, address, block_id))

    def _settled(self) -> bool:
        """Given up, it waits for copies under way: their slots are others' afterwards."""
        while self._staged and self._lane.still(self._staged[0].address):
            self._lane.free(self._staged.popleft().address)
        return not self._staged

    def _trailer(self) -> Message:
        data = trailer.pack(self._num_blocks, self._checksums, self._lane.block_bytes)
        return Message(None, len(data), address_of(data), data=data)

    def _finish(self, message: Message) -> None:
        if message.block_id is not None:
            self._lane.free(message.address)
            self.transfer.num_bytes += message.num_bytes


class _Incoming(Move):
    """Messages of whatever size, up to the trailer."""

    def _post(self) -> bool:
        route, flying = self.route, self._flying
        # What is no block may be the trailer: what follows would be another transfer's.
        if self._is_full() or (flying and flying[-1].block_id is None):
            return False
        if (came := route.channel.match(route.peer, route.tag)) is None:
            return False
        matched, num_bytes = came
        message = self._place(num_bytes)
        message.request = route.channel.receive(matched, message.address, num_bytes)
        self._flying.append(message)
        return True

    def _is_full(self) -> bool:
        return bool(self._flying)  # one at a time: any may be the last

    def _place(self, num_bytes: int) -> Message:
        data = bytearray(num_bytes)
        return Message(None, num_bytes, address_of(data), data=data)

    def _finish(self, message: Message) -> None:
        told = trailer.unpack(message.data)
        if told is None:
            self._unwanted(message)
        else:
            self.posting = False
            self._conclude(*told)

    def _unwanted(self, message: Message) -> None:
        self.transfer.num_bytes += message.num_bytes

    def _conclude(self, num_blocks: int, checksums: tuple[int, ...]) -> None:
        pass


class Draining(_Incoming):
    """To be thrown away."""


class Receiving(_Incoming):
    """Blocks into an arena, up to the trailer."""

    def __init__(self, lane: Lane, route: Route, block_ids: Sequence[int]):
        super().__init__(route, block_ids)
        self._lane = lane
        self._window = window(lane.block_bytes)
        self._landing: deque[int] = deque()  # addresses from where blocks go to their place
        self._checksums: list[int] | None = [] if route.checked and lane.in_host_memory else None

    def _is_full(self) -> bool:
        self._settled()
        return len(self._flying) + len(self._landing) >= self._window

    def _place(self, num_bytes: int) -> Message:
        if num_bytes != self._lane.block_bytes or not self._todo:
            return super()._place(num_bytes)
        block_id = self._todo.popleft()
        return Message(None, num_bytes, self._lane.incoming(block_id), block_id)

    def _finish(self, message: Message) -> None:
        if message.block_id is None:
            return super()._finish(message)
        if self._checksums is not None:
            data = bytes_at(message.address, message.num_bytes)
            self._checksums.append(trailer.checksum(data))
        self._lane.arrived(message.address, message.block_id)
        self._landing.append(message.address)
        self.transfer.num_bytes += message.num_bytes

    def _settled(self) -> bool:
        while self._landing and self._lane.still(self._landing[0]):
            self._lane.free(self._landing.popleft())
        return not self._landing

    def _unwanted(self, message: Message) -> None:
        super()._unwanted(message)
        self.transfer.fail("size")  # of the block, or of the whole

    def _conclude(self, num_blocks: int, checksums: tuple[int, ...]) -> None:
        if self._todo:
            self.transfer.fail("truncated")
        elif self._checksums is not None and list(checksums) != self._checksums:
            self.transfer.fail("checksum")
