"""Transfers that leave: as messages, or to be read by the receiver."""

import os
from collections import deque
from collections.abc import Sequence

from mellmpi.transport.blocks.block_transfer import BlockTransfer, Message, Route, message_of
from mellmpi.transport.blocks.framing import TransferHeader, checksum, pack_numbers
from mellmpi.transport.blocks.staging import StagingBuffer, bytes_at, window


class Leaving(BlockTransfer):
    """An opening, what belongs to it, and one byte that comes back: the receiver has it all."""

    _opening: TransferHeader

    def __init__(self, lane: StagingBuffer, route: Route, block_ids: Sequence[int]):
        super().__init__(route, block_ids)
        self._lane = lane
        self._checksums: list[int] = []
        self._answer = message_of(bytearray(1))

    def _open(self) -> bool:
        self._send(message_of(self._opening.pack()), self.route.tag)
        return True

    def _send_sums(self) -> bool:
        self._send(message_of(pack_numbers(self._checksums)), self.route.tag)
        return True

    def _await_answer(self) -> bool:
        self._receive(self._answer, self.route.answer_tag)
        return True

    def give_up(self) -> None:
        super().give_up()
        if self._answer in self._flying:
            self.route.channel.cancel(self._answer.request)


class Sending(Leaving):
    """An opening, one message a block, and the checksums if they are checked."""

    def __init__(self, lane: StagingBuffer, route: Route, block_ids: Sequence[int]):
        super().__init__(lane, route, block_ids)
        checked = route.checked and lane.in_host_memory
        self._opening = TransferHeader(len(block_ids), lane.block_bytes, checked)
        self._num_flying = 0  # blocks
        self._staged: deque[Message] = deque()  # being copied to where they are sent from
        # Checksums take time: a window of them before somebody else has a turn.
        self._window = window(lane.block_bytes) if checked else lane.send_window
        self._steps.extend([self._send_sums] if checked else [])
        self._steps.append(self._await_answer)
        self._opened = False

    def _post(self) -> bool:
        if not self._opened:
            self._opened = self._open()
            return True
        self._stage()
        if not self._staged and not self._todo:
            return self._take_step()
        if not self._staged:
            return False  # the window is full
        if not self._lane.still(self._staged[0].address):
            return False
        self._send_block(self._staged[0])
        return True

    def _send_block(self, message: Message) -> None:
        if self._opening.checked:
            self._checksums.append(checksum(bytes_at(message.address, message.num_bytes)))
        self._send(message, self.route.tag)
        self._num_flying += 1
        self._staged.popleft()

    def _stage(self) -> None:
        room = 1 if self._window is None else self._window - self._num_flying
        while self._todo and len(self._staged) < room:
            block_id = self._todo.popleft()
            address = self._lane.outgoing(block_id)
            self._staged.append(Message(self._lane.block_bytes, address, num_blocks=1))

    def _settled(self) -> bool:
        """Given up, it waits for copies under way: their slots are others' afterwards."""
        while self._staged and self._lane.still(self._staged[0].address):
            self._lane.free(self._staged.popleft().address)
        return not self._staged

    def _finish(self, message: Message, num_bytes: int) -> None:
        if message.num_blocks:
            self._num_flying -= 1
            self._lane.free(message.address)
            self.transfer.num_bytes += message.num_bytes


class Offering(Leaving):
    """An opening that says where the blocks are, and the checksums if they are checked."""

    def __init__(self, lane: StagingBuffer, route: Route, block_ids: Sequence[int]):
        super().__init__(lane, route, block_ids)
        addresses = tuple(lane.outgoing(block_id) for block_id in block_ids)
        self._opening = TransferHeader(
            len(block_ids), lane.block_bytes, route.checked, os.getpid(), addresses
        )
        self._window = window(lane.block_bytes)
        sums = [self._sum_some, self._send_sums] if route.checked else []
        self._steps.extend([self._open, *sums, self._await_answer])

    def drive(self, may_post: bool) -> bool:
        num_sums = len(self._checksums)
        return super().drive(may_post) or len(self._checksums) > num_sums

    def _post(self) -> bool:
        return self._take_step()

    def _sum_some(self) -> bool:
        """Checksums take time: a window of them before somebody else has a turn."""
        first, size = len(self._checksums), self._opening.block_bytes
        for address in self._opening.addresses[first : first + self._window]:
            self._checksums.append(checksum(bytes_at(address, size)))
        return len(self._checksums) == self._opening.num_blocks

    def _finish(self, message: Message, num_bytes: int) -> None:
        if message is self._answer and not self.transfer.failed:
            self.transfer.num_bytes = self._opening.num_bytes
