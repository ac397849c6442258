"""The Transport of one process among many: a channel for messages, one for blocks, and a bell."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mellmpi.transport.base import Arena, Transfer
from mellmpi.transport.blocks import BlockMover, ProgressThread, lane_for
from mellmpi.transport.channel import PeerChannel
from mellmpi.transport.doorbell import Doorbell
from mellmpi.transport.post import Post

FIRST_SLEEP_S = 100e-6  # where nobody rings: sleeps double from here on
MOVING_SPIN_S = 200e-6  # without a block done, then sleep all the same
BUSY_POLL_S = 0.001  # longest sleep while something is under way that may need our progress


@dataclass(frozen=True)
class Wakes:
    """How a process waits."""

    all_ring: bool  # every peer can ring our bell, and does
    longest_s: float  # sleep between looks
    spin_s: float  # look for so long before sleeping, while something is going on


class Endpoint:
    """See `base.Transport`. Messages and blocks have a channel each, and never match each other."""

    def __init__(
        self,
        post: Post,
        blocks: PeerChannel,
        bell: Doorbell,
        wakes: Wakes,
        device_buffers: bool,
        checked: frozenset[int] = frozenset(),  # peers to whom blocks go with checksums
        carried: bool = False,  # blocks move in a thread of their own
        read_by: frozenset[int] = frozenset(),  # peers that read blocks out of our memory
    ):
        self.worker, self.num_workers = post.rank, post.size - 1
        self.lost = post.lost
        self.read_by = read_by
        self._post, self._blocks = post, blocks
        is_checked = checked.__contains__
        self._mover = (
            ProgressThread(blocks, is_checked, bell.wake, read_by.__contains__)
            if carried
            else BlockMover(blocks, is_checked, read_by.__contains__)
        )
        self._bell, self._wakes, self._device_buffers = bell, wakes, device_buffers
        self._forgotten: set[int] = set()  # lost workers whose transfers have been ended
        self._active = True  # something happened since the last sleep

    @property
    def rings(self) -> bool:
        """Every peer can wake this one."""
        return self._wakes.all_ring

    # --- messages -------------------------------------------------------------------------------

    def send(self, dst: int, message: Any) -> None:
        self._post.send(dst, message)
        self._active = True
        self._bell.ring(dst)

    def poll(self) -> list[tuple[int, Any]]:
        self._mover.attend(True)  # a look at MPI carries TCP on, and takes its time then
        self._look()
        self._mover.attend(False)
        return self._post.poll()

    def unread(self, messages: list[tuple[int, Any]]) -> None:
        self._post.unread(messages)

    def _look(self) -> bool:
        """Take in what has come; True if there is anything for poll()."""
        came = self._post.look()
        self._active |= came
        for worker in self.lost - self._forgotten:
            self._forgotten.add(worker)
            self._mover.forget(worker)
        self._post.check(self._blocks.error)
        return came

    # --- blocks ---------------------------------------------------------------------------------

    def attach(self, arena: Arena | None) -> None:
        self._mover.attach(None if arena is None else lane_for(arena, self._device_buffers))

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
            self._bell.ring(peer)  # it may wait for these blocks to be gone, or for our progress
        self._active |= bool(peers)
        return bool(peers)

    # --- waiting --------------------------------------------------------------------------------

    def wait(self, timeout_s: float) -> None:
        self._mover.attend(True)
        self._wait(timeout_s)
        self._mover.attend(False)

    def _wait(self, timeout_s: float) -> None:
        now = time.perf_counter()
        deadline_s = now + timeout_s
        spin_until_s, sleep_s = now + self._spin_s(), FIRST_SLEEP_S
        num_ended = self._mover.num_ended
        while not self._look():
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
            if self._bell.sleep(min(deadline_s - now, self._limit_s(sleep_s))):
                return
            sleep_s *= 2

    def _spin_s(self) -> float:
        """How long to look before sleeping: not at all, unless something is going on."""
        if not self._active:
            return 0.0
        # Blocks that move are worth it on any machine: they are soon there, and a sleeper under
        # load comes back late. It yields to whoever wants the core.
        return MOVING_SPIN_S if self._mover.busy else self._wakes.spin_s

    def _limit_s(self, sleep_s: float) -> float:
        """How much of a growing sleep is allowed now."""
        if self._mover.busy or self._post.busy:
            return min(sleep_s, BUSY_POLL_S)
        return (
            self._wakes.longest_s if self._wakes.all_ring else min(sleep_s, self._wakes.longest_s)
        )

    def wake(self) -> None:
        self._bell.wake()

    # --- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        self._post.flush()
        self._mover.close()
        self._bell.close()
