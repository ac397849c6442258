"""The Transport of one process of a job: two channels, for messages and blocks, and a doorbell."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mellmpi.transport.base import Arena, Transfer
from mellmpi.transport.blocks import BlockMover, ProgressThread, staging_buffer_for
from mellmpi.transport.channel import PeerChannel
from mellmpi.transport.control_plane import ControlPlane
from mellmpi.transport.doorbell import Doorbell

FIRST_SLEEP_S = 100e-6  # sleeps double from here on unless every peer rings the doorbell
MOVING_SPIN_S = 200e-6  # busy polling after the last block that moved, before the first sleep
BUSY_POLL_S = 0.001  # longest sleep while transfers or messages may need our progress


@dataclass(frozen=True)
class WaitPolicy:
    """How a process waits for messages."""

    all_ring: bool  # every peer can ring our doorbell, and does
    longest_s: float  # longest sleep between two polls
    spin_s: float  # busy polling before the first sleep, while there is activity


class Endpoint:
    """See `base.Transport`. Messages and blocks have separate channels and never match."""

    def __init__(
        self,
        control: ControlPlane,
        blocks: PeerChannel,
        bell: Doorbell,
        wait_policy: WaitPolicy,
        device_buffers: bool,
        checked: frozenset[int] = frozenset(),  # peers whose blocks have checksums
        progress_thread: bool = False,  # a separate thread moves the blocks
        read_by: frozenset[int] = frozenset(),  # peers that read blocks out of our memory
    ):
        self.worker, self.num_workers = control.rank, control.size - 1
        self.lost = control.lost
        self.read_by = read_by
        self._control, self._blocks = control, blocks
        is_checked = checked.__contains__
        self._mover = (
            ProgressThread(blocks, is_checked, bell.wake, read_by.__contains__)
            if progress_thread
            else BlockMover(blocks, is_checked, read_by.__contains__)
        )
        self._bell, self._wait_policy = bell, wait_policy
        self._device_buffers = device_buffers
        self._dropped: set[int] = set()  # lost workers whose transfers have been ended
        self._active = True  # something happened since the last sleep

    @property
    def all_ring(self) -> bool:
        """Every peer can wake this process."""
        return self._wait_policy.all_ring

    # --- messages -------------------------------------------------------------------------------

    def send(self, dst: int, message: Any) -> None:
        self._control.send(dst, message)
        self._active = True
        self._bell.ring(dst)

    def poll(self) -> list[tuple[int, Any]]:
        # Polling MPI also moves blocks over TCP, and may take as long as a call of `progress`.
        self._mover.set_polling(True)
        self._receive()
        self._mover.set_polling(False)
        return self._control.poll()

    def unread(self, messages: list[tuple[int, Any]]) -> None:
        self._control.unread(messages)

    def _receive(self) -> bool:
        """Receive all messages that have arrived; True if there is anything for `poll`."""
        received = self._control.receive()
        self._active |= received
        for worker in self.lost - self._dropped:
            self._dropped.add(worker)
            self._mover.drop_peer(worker)
        self._control.check(self._blocks.error)
        return received

    # --- blocks ---------------------------------------------------------------------------------

    def attach(self, arena: Arena | None) -> None:
        self._mover.attach(
            None if arena is None else staging_buffer_for(arena, self._device_buffers)
        )

    def send_blocks(self, dst: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        transfer = self._mover.send(dst, tag, block_ids)
        self._bell.ring(dst)
        return transfer

    def receive_blocks(self, src: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        return self._mover.receive(src, tag, block_ids)

    def drain_blocks(self, src: int, tag: int, num_blocks: int) -> Transfer:
        return self._mover.drain(src, tag, num_blocks)

    def progress(self) -> bool:
        peers = self._mover.progress()
        for peer in peers:
            self._bell.ring(peer)  # it may wait for the end of the transfer, or for our progress
        self._active |= bool(peers)
        return bool(peers)

    # --- waiting --------------------------------------------------------------------------------

    def wait(self, timeout_s: float, descriptors: Sequence[int] = ()) -> None:
        self._mover.set_polling(True)
        self._wait(timeout_s, descriptors)
        self._mover.set_polling(False)

    def _wait(self, timeout_s: float, descriptors: Sequence[int]) -> None:
        now = time.perf_counter()
        deadline_s = now + timeout_s
        spin_until_s, sleep_s = now + self._spin_s(), FIRST_SLEEP_S
        num_ended = self._mover.num_ended
        while not self._receive():
            moved = self.progress()
            if (now := time.perf_counter()) >= deadline_s or self._mover.num_ended != num_ended:
                return
            if moved or self._mover.reading:
                spin_until_s, sleep_s = now + self._spin_s(), FIRST_SLEEP_S
                continue
            if now < spin_until_s:
                os.sched_yield()
                continue
            self._active = False
            limit_s = min(deadline_s - now, self._limit_s(sleep_s))
            if self._bell.sleep(limit_s, descriptors):
                return
            sleep_s *= 2

    def _spin_s(self) -> float:
        """How long to poll busily before the first sleep; 0 without activity."""
        if not self._active:
            return 0.0
        # Spin for moving blocks even where ranks share cores: the rest arrives soon, and on a
        # loaded machine a sleeping process wakes up late. The loop yields the core to others.
        return MOVING_SPIN_S if self._mover.busy else self._wait_policy.spin_s

    def _limit_s(self, sleep_s: float) -> float:
        """Returns how long the next sleep may be, where doubling would make it `sleep_s`."""
        if self._mover.busy or self._control.busy:
            return min(sleep_s, BUSY_POLL_S)
        longest_s = self._wait_policy.longest_s
        return longest_s if self._wait_policy.all_ring else min(sleep_s, longest_s)

    def wake(self) -> None:
        self._bell.wake()

    # --- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        self._control.flush()
        self._mover.close()
        self._bell.close()
