"""Sends of blocks: as messages, or by giving the receiver their addresses to read."""

import os
from collections import deque
from collections.abc import Sequence

from mellmpi.transport.blocks.block_transfer import BlockTransfer, Message, Route, message_of
from mellmpi.transport.blocks.framing import TransferHeader, checksum, pack_numbers
from mellmpi.transport.blocks.staging import StagingBuffer, bytes_at, window


class OutgoingTransfer(BlockTransfer):
    """Sends a header and checksums, and receives the receiver's answer of one byte at the end."""

    _header: TransferHeader

    def __init__(self, staging: StagingBuffer, route: Route, block_ids: Sequence[int]):
        super().__init__(route, block_ids)
        self._staging = staging
        self._checksums: list[int] = []
        self._answer = message_of(bytearray(1))

    def _send_header(self) -> bool:
        self._send(message_of(self._header.pack()), self.route.tag)
        return True

    def _send_checksums(self) -> bool:
        self._send(message_of(pack_numbers(self._checksums)), self.route.tag)
        return True

    def _receive_answer(self) -> bool:
        self._receive(self._answer, self.route.answer_tag)
        return True

    def give_up(self) -> None:
        super().give_up()
        if self._answer in self._in_flight:
            self.route.channel.cancel(self._answer.request)


class MessageSend(OutgoingTransfer):
    """Sends a header, one message per block, and the checksums if they are enabled."""

    def __init__(self, staging: StagingBuffer, route: Route, block_ids: Sequence[int]):
        super().__init__(staging, route, block_ids)
        checked = route.checked and staging.in_host_memory
        self._header = TransferHeader(len(block_ids), staging.block_bytes, checked)
        self._num_blocks_in_flight = 0
        self._staged: deque[Message] = deque()  # being copied to the address they are sent from
        # Checksums take time: after a window of them other transfers get a chance.
        self._window = window(staging.block_bytes) if checked else staging.send_window
        self._steps.extend([self._send_checksums] if checked else [])
        self._steps.append(self._receive_answer)
        self._header_sent = False

    def _post(self) -> bool:
        if not self._header_sent:
            self._header_sent = self._send_header()
            return True
        self._stage()
        if not self._staged and not self._unposted:
            return self._take_step()
        if not self._staged:
            return False  # the window is full
        if not self._staging.copy_done(self._staged[0].address):
            return False
        self._send_block(self._staged[0])
        return True

    def _send_block(self, message: Message) -> None:
        if self._header.checked:
            self._checksums.append(checksum(bytes_at(message.address, message.num_bytes)))
        self._send(message, self.route.tag)
        self._num_blocks_in_flight += 1
        self._staged.popleft()

    def _stage(self) -> None:
        room = 1 if self._window is None else self._window - self._num_blocks_in_flight
        while self._unposted and len(self._staged) < room:
            address = self._staging.send_address(self._unposted.popleft())
            self._staged.append(Message(self._staging.block_bytes, address, num_blocks=1))

    def _copies_done(self) -> bool:
        """After `give_up`: waits for copies in progress before others may use their addresses."""
        while self._staged and self._staging.copy_done(self._staged[0].address):
            self._staging.release(self._staged.popleft().address)
        return not self._staged

    def _on_complete(self, message: Message, num_bytes: int) -> None:
        if message.num_blocks:
            self._num_blocks_in_flight -= 1
            self._staging.release(message.address)
            self.handle.num_bytes += message.num_bytes


class CrossMemorySend(OutgoingTransfer):
    """Sends a header with the addresses of the blocks, and the checksums if they are enabled."""

    def __init__(self, staging: StagingBuffer, route: Route, block_ids: Sequence[int]):
        super().__init__(staging, route, block_ids)
        addresses = tuple(staging.send_address(block_id) for block_id in block_ids)
        self._header = TransferHeader(
            len(block_ids), staging.block_bytes, route.checked, os.getpid(), addresses
        )
        self._window = window(staging.block_bytes)
        checksums = [self._compute_checksums, self._send_checksums] if route.checked else []
        self._steps.extend([self._send_header, *checksums, self._receive_answer])

    def drive(self, may_post: bool) -> bool:
        num_checksums = len(self._checksums)
        return super().drive(may_post) or len(self._checksums) > num_checksums

    def _post(self) -> bool:
        return self._take_step()

    def _compute_checksums(self) -> bool:
        """Compute a window of checksums, so that other transfers get a chance; True at the end."""
        first, size = len(self._checksums), self._header.block_bytes
        for address in self._header.addresses[first : first + self._window]:
            self._checksums.append(checksum(bytes_at(address, size)))
        return len(self._checksums) == self._header.num_blocks

    def _on_complete(self, message: Message, num_bytes: int) -> None:
        if message is self._answer and not self.handle.failed:
            self.handle.num_bytes = self._header.num_bytes
