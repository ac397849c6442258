"""Receives of blocks: by messages posted ahead, or by reading the sender's memory."""

from collections import deque
from collections.abc import Sequence

from mellmpi.transport.blocks.block_transfer import BlockTransfer, Message, Route, message_of
from mellmpi.transport.blocks.cross_memory import CrossMemoryRead
from mellmpi.transport.blocks.framing import TransferHeader, checksum, pack_numbers
from mellmpi.transport.blocks.staging import StagingBuffer, bytes_at, window


class Drain(BlockTransfer):
    """Receives and discards one transfer; its header says how many blocks of which size follow."""

    is_receive, uses_arena = True, False

    def __init__(self, route: Route, block_ids: Sequence[int]):
        super().__init__(route, block_ids)
        self._header: TransferHeader | None = None
        self._num_unposted = 0  # blocks that no receive was posted for
        self._checksum_message: Message | None = None

    def _post(self) -> bool:
        if self._header is None:
            return self._receive_header()
        if self._num_unposted:
            return self._post_block(self._header)
        return self._take_step()

    def _receive_header(self) -> bool:
        """Receive the header if it has arrived."""
        route = self.route
        if self._in_flight or (found := route.channel.match(route.peer, route.tag)) is None:
            return False
        matched, num_bytes = found
        message = message_of(bytearray(num_bytes))
        message.request = route.channel.receive_matched(
            matched, route.peer, message.address, num_bytes
        )
        self._in_flight.append(message)
        return self._reap()

    def _on_header(self, header: TransferHeader) -> None:
        self.handle.begin()  # the receive may have been posted long before the send
        self._header, self._num_unposted = header, header.num_blocks
        self._steps.extend([self._receive_checksums] if header.checked else [])
        self._steps.append(self._answer)

    def _post_block(self, header: TransferHeader) -> bool:
        """Post a receive of the next block; False if too many are in flight."""
        if header.pid is not None:  # no messages with blocks follow
            self._num_unposted = 0
            self.handle.num_bytes += header.num_bytes
            return True
        if self._in_flight:
            return False
        block = message_of(bytearray(header.block_bytes))
        block.num_blocks = 1
        self._receive_block(block)
        return True

    def _receive_block(self, block: Message) -> None:
        self._receive(block, self.route.tag)
        self._num_unposted -= 1

    def _receive_checksums(self) -> bool:
        assert self._header is not None
        self._checksum_message = message_of(bytearray(8 * self._header.num_blocks))
        self._receive(self._checksum_message, self.route.tag)
        return True

    def _answer(self) -> bool:
        """Tell the sender that all blocks are received: it may use its blocks again."""
        if self._in_flight:
            return False
        self._send(message_of(bytearray(1)), self.route.answer_tag)
        return True

    def _on_complete(self, message: Message, num_bytes: int) -> None:
        if self._header is None:
            self._on_header(TransferHeader.unpack(message.data))
        elif message is self._checksum_message:
            self._compare_checksums(message.data)
        elif message.num_blocks:
            self.handle.num_bytes += num_bytes
            self._on_blocks(message)
            if num_bytes != message.num_bytes:
                self.handle.fail("size")

    def _on_blocks(self, blocks: Message) -> None:
        pass

    def _compare_checksums(self, packed: bytearray) -> None:
        pass

    def give_up(self) -> None:
        super().give_up()
        for message in self._in_flight:
            if isinstance(message.request, CrossMemoryRead):
                self.route.reads.cancel(message.request)
            else:
                self.route.channel.cancel(message.request)


class Receive(Drain):
    """Receives blocks into an arena; discards them if the header does not match the request."""

    uses_arena = True

    def __init__(self, staging: StagingBuffer, route: Route, block_ids: Sequence[int]):
        super().__init__(route, block_ids)
        self._staging = staging
        self._room = window(staging.block_bytes)  # blocks that may still be posted
        self._copying: deque[int] = deque()  # addresses from which blocks are copied to the arena
        checked = route.checked and staging.in_host_memory
        self._checksums: list[int] | None = [] if checked else None

    def _on_header(self, header: TransferHeader) -> None:
        super()._on_header(header)
        num_expected = len(self._unposted)
        if header.block_bytes != self._staging.block_bytes or header.num_blocks > num_expected:
            self.handle.fail("size")  # of a block, or of the transfer
        elif header.num_blocks < num_expected:
            self.handle.fail("truncated")
        elif self._checksums is not None and not header.checked:
            self.handle.fail("checksum")
        if self.handle.failed:
            self._unposted.clear()

    def _post_block(self, header: TransferHeader) -> bool:
        if not self._unposted:
            return super()._post_block(header)
        self._copies_done()
        if not self._room:
            return False
        if header.pid is not None:
            self._read_blocks(header, header.pid)
        else:
            self._receive_block(self._next_block(header.block_bytes))
        return True

    def _next_block(self, num_bytes: int) -> Message:
        block_id = self._unposted.popleft()
        address = self._staging.receive_address(block_id)
        self._room -= 1
        return Message(num_bytes, address, None, 1, ((block_id, address),))

    def _read_blocks(self, header: TransferHeader, pid: int) -> None:
        """Read all remaining blocks; for a device, as many as there is room for in host memory."""
        size, first = header.block_bytes, header.num_blocks - self._num_unposted
        in_place = self._staging.can_be_read
        count = self._num_unposted if in_place else min(self._room, self._num_unposted)
        block_ids = [self._unposted.popleft() for _ in range(count)]
        targets = [self._staging.receive_address(block_id) for block_id in block_ids]
        read = CrossMemoryRead(
            pid,
            header.addresses[first : first + count],
            targets,
            size,
            self._checksums is not None,
        )
        self.route.reads.add(read)
        destinations = () if in_place else tuple(zip(block_ids, targets, strict=True))
        self._room -= len(destinations)
        self._in_flight.append(Message(count * size, 0, read, count, destinations))
        self._num_unposted -= count

    def _on_blocks(self, blocks: Message) -> None:
        if self._checksums is not None:
            self._checksums += self._checksums_of(blocks)
        for block_id, address in blocks.destinations:
            self._staging.received(address, block_id)
            self._copying.append(address)

    def _checksums_of(self, blocks: Message) -> list[int]:
        if isinstance(blocks.request, CrossMemoryRead):
            return blocks.request.checksums
        if not blocks.destinations:
            return []
        return [checksum(bytes_at(blocks.address, blocks.num_bytes))]

    def _copies_done(self) -> bool:
        while self._copying and self._staging.copy_done(self._copying[0]):
            self._staging.release(self._copying.popleft())
            self._room += 1
        return not self._copying

    def _compare_checksums(self, packed: bytearray) -> None:
        if self._checksums is not None and packed != pack_numbers(self._checksums):
            self.handle.fail("checksum")
