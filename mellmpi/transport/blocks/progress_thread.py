"""A thread that advances transfers while the main thread computes.

A decode step on a CPU is one compiled call that releases the GIL, and on a GPU it is a wait, so
both run in parallel. If transfers advanced only between steps, they would be idle most of the time.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from mellmpi.transport.base import Transfer
from mellmpi.transport.blocks.block_mover import BURST_S, BlockMover
from mellmpi.transport.blocks.block_transfer import BlockTransfer
from mellmpi.transport.blocks.cross_memory import PIECE_BYTES, SHORT_PIECE_BYTES
from mellmpi.transport.blocks.staging import StagingBuffer
from mellmpi.transport.channel import Channel

AWAY_S = 300e-6  # a main thread that has not called for so long is computing
LONGEST_REST_S = 5e-3  # rests double up to here while the main thread keeps calling
SPIN_S = 200e-6  # busy polling after the last movement, before the first sleep
FIRST_SLEEP_S = 50e-6  # sleeps double from here on
MOVING_SLEEP_S = 200e-6  # longest sleep for MOVING_S: a fast link fills its buffers within 1 ms
MOVING_S = 0.02  # after the last movement
LONGEST_SLEEP_S = 1e-3


class ProgressThread(BlockMover):
    """A BlockMover that needs no `progress`. A main thread that calls it makes transfers faster.

    on_end  called in the thread after it has ended a transfer, or has read blocks while the main
            thread polls
    """

    def __init__(
        self,
        channel: Channel,
        checked: Callable[[int], bool],
        on_end: Callable[[], None],
        read_by: Callable[[int], bool] = lambda _: False,
    ):
        super().__init__(channel, checked, read_by)
        self._on_end = on_end
        self._requested: list[BlockTransfer] = []  # by the main thread
        self._driving = threading.Lock()  # held by the thread that accesses the transfers
        self._orders: deque[Callable[[], object]] = deque()  # done with the lock held
        self._wake = threading.Event()
        self._main_polls = False  # the main thread waits, and calls `progress` meanwhile
        self._main_called_s = 0.0  # time of its last call
        self._resting = False  # for longer than AWAY_S
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    # --- in the main thread ---------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._transfers or self._orders)

    def set_polling(self, polling: bool) -> None:
        self._main_polls, self._main_called_s = polling, time.perf_counter()
        if self._resting and not polling:
            self._resting = False
            self._wake.set()

    def attach(self, staging: StagingBuffer | None) -> None:
        self._requested = [t for t in self._requested if not t.handle.done]
        users = [transfer for transfer in self._requested if transfer.uses_arena]
        assert not users, "transfers in progress use the arena"
        self._staging = staging

    def _begin(self, transfer: BlockTransfer) -> Transfer:
        if not transfer.posting:
            transfer.handle.end()
            return transfer.handle
        self._requested = [*(t for t in self._requested if not t.handle.done), transfer]
        self._order(partial(super()._begin, transfer))
        return transfer.handle

    def drop_peer(self, peer: int) -> None:
        self._order(partial(super().drop_peer, peer))

    def _order(self, order: Callable[[], object]) -> None:
        self._orders.append(order)
        self.progress()
        self._wake.set()

    def progress(self) -> list[int]:
        if self._failure is not None:
            raise self._failure
        self._main_called_s = time.perf_counter()
        if not self.busy or not self._driving.acquire(blocking=False):
            return []
        reading = bool(self._reads)
        try:
            self._carry_out_orders()
            # A main thread that polls has time for a burst; between steps it makes one round.
            peers = self._burst(self._main_called_s + BURST_S * self._main_polls)
        finally:
            self._main_called_s = time.perf_counter()
            self._driving.release()
        if self._reads and (self._main_polls or not reading):
            # Two threads read faster than one, and the other one goes on during the next step.
            self._wake.set()
            stop_s = time.perf_counter() + BURST_S * self._main_polls
            while self._reads.copy_piece(SHORT_PIECE_BYTES) and time.perf_counter() < stop_s:
                pass
        return sorted(peers)

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join()
        self._carry_out_orders()
        super().close()

    # --- in either thread, with the lock --------------------------------------------------------

    def _carry_out_orders(self) -> bool:
        """Returns whether there were any."""
        found = bool(self._orders)
        while self._orders:
            self._orders.popleft()()
        return found

    # --- in the progress thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._wake.wait()
                self._wake.clear()
                self._advance()
        except BaseException as failure:  # a bug: the main thread raises it
            self._failure = failure
            self._on_end()

    def _advance(self) -> None:
        """Advance transfers until none is left."""
        moved_s, sleep_s, rest_s = time.perf_counter(), FIRST_SLEEP_S, AWAY_S
        while self.busy and not self._closing:
            if self._reads.copy_piece(SHORT_PIECE_BYTES if self._main_polls else PIECE_BYTES):
                moved_s, sleep_s = time.perf_counter(), FIRST_SLEEP_S
                if self._main_polls and not self._reads:
                    self._on_end()  # the main thread completes the transfer
                if self._main_polls or (self._reads and len(self._transfers) == 1):
                    continue
            if self._is_main_active():
                rest_s = self._rest(rest_s)
                continue
            rest_s = AWAY_S
            if self._drive():
                moved_s, sleep_s = time.perf_counter(), FIRST_SLEEP_S
                continue
            idle_s = time.perf_counter() - moved_s
            if idle_s < SPIN_S:
                os.sched_yield()
                continue
            time.sleep(sleep_s)
            sleep_s = min(2 * sleep_s, MOVING_SLEEP_S if idle_s < MOVING_S else LONGEST_SLEEP_S)

    def _rest(self, rest_s: float) -> float:
        """Wait for `rest_s` at most. Returns the next duration.

        Rests get longer because every wake-up of this thread takes time from the main thread.
        """
        self._resting = rest_s > AWAY_S  # then the main thread ends the rest when it stops polling
        woken = self._wake.wait(rest_s)
        self._wake.clear()
        return AWAY_S if woken else min(2 * rest_s, LONGEST_REST_S)

    def _is_main_active(self) -> bool:
        """The main thread advances the transfers itself."""
        active = self._main_polls or self._driving.locked()
        return active or time.perf_counter() - self._main_called_s < AWAY_S

    def _drive(self) -> bool:
        """Make one round. Returns whether anything moved."""
        with self._driving:
            requested = [t for t in self._requested if not t.handle.done]
            moved = self._carry_out_orders()
            moved |= bool(self._round(self._transfers))
        if any(transfer.handle.done for transfer in requested):
            self._on_end()
        return moved
