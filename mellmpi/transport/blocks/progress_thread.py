"""Carries transfers on in a thread of its own while this worker computes.

A decode step on a CPU is one compiled call that holds no lock of Python's, and on a GPU it is a
wait: both go on together. Between steps alone, a transfer would stand still most of the time.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from mellmpi.transport.base import Transfer
from mellmpi.transport.blocks.block_mover import BURST_S, BlockMover
from mellmpi.transport.blocks.block_transfer import BlockTransfer
from mellmpi.transport.blocks.cross_memory import PIECE_BYTES, SHORT_PIECE_BYTES
from mellmpi.transport.blocks.staging import StagingBuffer
from mellmpi.transport.channel import Channel

AWAY_S = 300e-6  # a main thread that has not looked for so long is computing
LONGEST_REST_S = 5e-3  # rests double up to here while it looks again and again
SPIN_S = 200e-6  # without anything done, then sleep
FIRST_SLEEP_S = 50e-6  # doubles from here on
MOVING_SLEEP_S = 200e-6  # at most, for a while: a fast link fills its buffers in a millisecond
MOVING_S = 0.02  # so long after something moved
LONGEST_SLEEP_S = 1e-3


class ProgressThread(BlockMover):
    """A mover that needs no `progress`; a main thread that waits anyway may help, and is quicker.

    ended  called in the thread when it has brought a transfer to its end, or read for the other
    """

    def __init__(
        self,
        channel: Channel,
        checked: Callable[[int], bool],
        ended: Callable[[], None],
        read_by: Callable[[int], bool] = lambda _: False,
    ):
        super().__init__(channel, checked, read_by)
        self._ended = ended
        self._begun: list[BlockTransfer] = []  # seen from outside
        self._driving = threading.Lock()  # held by whoever touches the moves
        self._orders: deque[Callable[[], Any]] = deque()  # what could not be done at once
        self._asked = threading.Event()
        self._attended = False  # the main thread waits, and moves blocks meanwhile
        self._looked_s = 0.0  # when it was here last
        self._resting = False  # longer than AWAY_S
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="carrier", daemon=True)
        self._thread.start()

    # --- in the main thread ---------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._moves or self._orders)

    def attend(self, present: bool) -> None:
        self._attended, self._looked_s = present, time.perf_counter()
        if self._resting and not present:
            self._resting = False
            self._asked.set()

    def attach(self, lane: StagingBuffer | None) -> None:
        self._begun = [move for move in self._begun if not move.transfer.done]
        users = [move for move in self._begun if move.uses_arena]
        assert not users, "blocks are under way; the arena cannot go"
        self._lane = lane

    def _begin(self, move: BlockTransfer) -> Transfer:
        if not move.posting:
            move.transfer.end()
            return move.transfer
        self._begun = [*(m for m in self._begun if not m.transfer.done), move]
        self._ask(partial(super()._begin, move))
        return move.transfer

    def forget(self, peer: int) -> None:
        self._ask(partial(super().forget, peer))

    def _ask(self, order: Callable[[], Any]) -> None:
        self._orders.append(order)
        self.progress()
        self._asked.set()

    def progress(self) -> list[int]:
        if self._failure is not None:
            raise self._failure
        self._looked_s = time.perf_counter()
        if not self.busy or not self._driving.acquire(blocking=False):
            return []
        reading = bool(self._reads)
        try:
            self._obey()
            # It waits and has the time; between steps it has none.
            peers = self._burst(self._looked_s + BURST_S * self._attended)
        finally:
            self._looked_s = time.perf_counter()
            self._driving.release()
        if self._reads and (self._attended or not reading):
            # Two read faster than one; and the other is awake when this one goes on to compute.
            self._asked.set()
            stop_s = time.perf_counter() + BURST_S * self._attended
            while self._reads.carry_out(SHORT_PIECE_BYTES) and time.perf_counter() < stop_s:
                pass
        return sorted(peers)

    def close(self) -> None:
        self._closing = True
        self._asked.set()
        self._thread.join()
        self._obey()
        super().close()

    # --- in either, while driving ---------------------------------------------------------------

    def _obey(self) -> bool:
        """Do what was asked meanwhile; True if anything was."""
        asked = bool(self._orders)
        while self._orders:
            self._orders.popleft()()
        return asked

    # --- in the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._asked.wait()
                self._asked.clear()
                self._carry()
        except BaseException as failure:  # a bug: the main thread tells the story
            self._failure = failure
            self._ended()

    def _carry(self) -> None:
        """Until nothing is left to carry."""
        moved_s, sleep_s, rest_s = time.perf_counter(), FIRST_SLEEP_S, AWAY_S
        while self.busy and not self._closing:
            if self._reads.carry_out(SHORT_PIECE_BYTES if self._attended else PIECE_BYTES):
                moved_s, sleep_s = time.perf_counter(), FIRST_SLEEP_S
                if self._attended and not self._reads:
                    self._ended()  # who waits takes in what has been read
                if self._attended or (self._reads and len(self._moves) == 1):
                    continue
            if self._is_main_here():
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
        """For so long at most; how long next time. Every waking takes time from the main thread."""
        self._resting = rest_s > AWAY_S  # and to be woken when it leaves
        woken = self._asked.wait(rest_s)
        self._asked.clear()
        return AWAY_S if woken else min(2 * rest_s, LONGEST_REST_S)

    def _is_main_here(self) -> bool:
        here = self._attended or self._driving.locked()
        return here or time.perf_counter() - self._looked_s < AWAY_S

    def _drive(self) -> bool:
        """One round; True if anything moved."""
        with self._driving:
            begun = [move for move in self._begun if not move.transfer.done]
            moved = self._obey()
            moved |= bool(self._round(self._moves))
        if any(move.transfer.done for move in begun):
            self._ended()
        return moved
