"""Transfers that come: posted ahead of the messages, or read out of the sender's memory."""

from collections import deque
from collections.abc import Sequence

from mellmpi.transport.blocks.block_transfer import BlockTransfer, Message, Route, message_of
from mellmpi.transport.blocks.cross_memory import CrossMemoryRead
from mellmpi.transport.blocks.framing import TransferHeader, checksum, pack_numbers, unpack_opening
from mellmpi.transport.blocks.staging import StagingBuffer, bytes_at, window


class Draining(BlockTransfer):
    """What was sent, whatever was announced, to be thrown away. The opening says what comes."""

    comes, uses_arena = True, False

    def __init__(self, route: Route, block_ids: Sequence[int]):
        super().__init__(route, block_ids)
        self._opening: TransferHeader | None = None
        self._num_left = 0  # blocks that nothing was posted for
        self._sums: Message | None = None

    def _post(self) -> bool:
        if self._opening is None:
            return self._open()
        if self._num_left:
            return self._begin(self._opening)
        return self._take_step()

    def _open(self) -> bool:
        """Take the opening in, if it has come."""
        route = self.route
        if self._flying or (came := route.channel.match(route.peer, route.tag)) is None:
            return False
        matched, num_bytes = came
        message = message_of(bytearray(num_bytes))
        message.request = route.channel.receive_matched(
            matched, route.peer, message.address, num_bytes
        )
        self._flying.append(message)
        return self._reap()

    def _opened(self, opening: TransferHeader) -> None:
        self.transfer.begin()  # a source may announce what it sends only much later
        self._opening, self._num_left = opening, opening.num_blocks
        self._steps.extend([self._receive_sums] if opening.checked else [])
        self._steps.append(self._answer)

    def _begin(self, opening: TransferHeader) -> bool:
        """Post the next block; False if too many are under way."""
        if opening.pid is not None:  # nothing is on the wire
            self._num_left = 0
            self.transfer.num_bytes += opening.num_bytes
            return True
        if self._flying:
            return False
        block = message_of(bytearray(opening.block_bytes))
        block.num_blocks = 1
        self._receive_block(block)
        return True

    def _receive_block(self, block: Message) -> None:
        self._receive(block, self.route.tag)
        self._num_left -= 1

    def _receive_sums(self) -> bool:
        assert self._opening is not None
        self._sums = message_of(bytearray(8 * self._opening.num_blocks))
        self._receive(self._sums, self.route.tag)
        return True

    def _answer(self) -> bool:
        """Tell the sender that all is here; it may have its blocks back."""
        if self._flying:
            return False
        self._send(message_of(bytearray(1)), self.route.answer_tag)
        return True

    def _finish(self, message: Message, num_bytes: int) -> None:
        if self._opening is None:
            self._opened(unpack_opening(message.data))
        elif message is self._sums:
            self._conclude(message.data)
        elif message.num_blocks:
            self.transfer.num_bytes += num_bytes
            self._arrived(message)
            if num_bytes != message.num_bytes:
                self.transfer.fail("size")

    def _arrived(self, blocks: Message) -> None:
        pass

    def _conclude(self, sums: bytearray) -> None:
        pass

    def give_up(self) -> None:
        super().give_up()
        for message in self._flying:
            if isinstance(message.request, CrossMemoryRead):
                self.route.reads.drop(message.request)
            else:
                self.route.channel.cancel(message.request)


class Receiving(Draining):
    """Blocks into an arena. Those of a stream that is not what was announced are thrown away."""

    uses_arena = True

    def __init__(self, lane: StagingBuffer, route: Route, block_ids: Sequence[int]):
        super().__init__(route, block_ids)
        self._lane = lane
        self._room = window(lane.block_bytes)  # for blocks under way
        self._landing: deque[int] = deque()  # addresses from where blocks go to their place
        self._checksums: list[int] | None = [] if route.checked and lane.in_host_memory else None

    def _opened(self, opening: TransferHeader) -> None:
        super()._opened(opening)
        if opening.block_bytes != self._lane.block_bytes or opening.num_blocks > len(self._todo):
            self.transfer.fail("size")  # of a block, or of the whole
        elif opening.num_blocks < len(self._todo):
            self.transfer.fail("truncated")
        elif self._checksums is not None and not opening.checked:
            self.transfer.fail("checksum")
        if self.transfer.failed:
            self._todo.clear()

    def _begin(self, opening: TransferHeader) -> bool:
        if not self._todo:
            return super()._begin(opening)
        self._settled()
        if not self._room:
            return False
        if opening.pid is not None:
            self._read(opening, opening.pid)
        else:
            self._receive_block(self._block(opening.block_bytes))
        return True

    def _block(self, num_bytes: int) -> Message:
        block = self._todo.popleft()
        address = self._lane.incoming(block)
        self._room -= 1
        return Message(num_bytes, address, None, 1, ((block, address),))

    def _read(self, opening: TransferHeader, pid: int) -> None:
        """All that is left, or as many as there is room for on their way to a device."""
        size, first = opening.block_bytes, opening.num_blocks - self._num_left
        in_place = self._lane.can_be_read
        count = self._num_left if in_place else min(self._room, self._num_left)
        blocks = [self._todo.popleft() for _ in range(count)]
        targets = [self._lane.incoming(block) for block in blocks]
        read = CrossMemoryRead(
            pid,
            opening.addresses[first : first + count],
            targets,
            size,
            self._checksums is not None,
        )
        self.route.reads.begin(read)
        places = () if in_place else tuple(zip(blocks, targets, strict=True))
        self._room -= len(places)
        self._flying.append(Message(count * size, 0, read, count, places))
        self._num_left -= count

    def _arrived(self, blocks: Message) -> None:
        if self._checksums is not None:
            self._checksums += self._checksums_of(blocks)
        for block, address in blocks.places:
            self._lane.arrived(address, block)
            self._landing.append(address)

    def _checksums_of(self, blocks: Message) -> list[int]:
        if isinstance(blocks.request, CrossMemoryRead):
            return blocks.request.checksums
        if not blocks.places:
            return []
        return [checksum(bytes_at(blocks.address, blocks.num_bytes))]

    def _settled(self) -> bool:
        while self._landing and self._lane.still(self._landing[0]):
            self._lane.free(self._landing.popleft())
            self._room += 1
        return not self._landing

    def _conclude(self, sums: bytearray) -> None:
        if self._checksums is not None and sums != pack_numbers(self._checksums):
            self.transfer.fail("checksum")
