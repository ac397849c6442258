"""Carries transfers on in a thread of its own, while this worker computes.

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
from mellmpi.transport.blocks import BlockMover
from mellmpi.transport.channel import Channel
from mellmpi.transport.lanes import Lane
from mellmpi.transport.moves import Draining, Move

SPIN_S = 200e-6  # without anything done, then sleep
FIRST_SLEEP_S = 50e-6  # doubles from here on
MOVING_SLEEP_S = 200e-6  # at most, for a while: a fast link fills its buffers in a millisecond
MOVING_S = 0.02  # so long after something moved
LONGEST_SLEEP_S = 1e-3


class Carrier(BlockMover):
    """A mover whose transfers move by themselves: `progress` has nothing to do.

    The channel is used by this thread alone; MPI must allow several. Orders are obeyed in order.

    ended  called in the thread when a transfer has ended
    """

    def __init__(self, channel: Channel, checked: Callable[[int], bool],
                 ended: Callable[[], None]):  # fmt: skip
        super().__init__(channel, checked)
        self._ended = ended
        self._begun: list[Move] = []  # seen from outside
        self._orders: deque[Callable[[], Any]] = deque()
        self._asked = threading.Event()
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="carrier", daemon=True)
        self._thread.start()

    # --- from outside ---------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return False

    def attach(self, lane: Lane | None) -> None:
        self._begun = [move for move in self._begun if not move.transfer.done]
        users = [move for move in self._begun if not isinstance(move, Draining)]
        assert not users, "blocks are under way; the arena cannot go"
        self._lane = lane

    def _begin(self, move: Move) -> Transfer:
        if move.posting:
            self._begun.append(move)
            self._ask(partial(super()._begin, move))
        else:
            move.transfer.end()
        return move.transfer

    def progress(self) -> list[int]:
        if self._failure is not None:
            raise self._failure
        return []

    def forget(self, peer: int) -> None:
        self._ask(partial(super().forget, peer))

    def _ask(self, order: Callable[[], Any]) -> None:
        self._orders.append(order)
        self._asked.set()

    def close(self) -> None:
        self._closing = True
        self._asked.set()
        self._thread.join()
        self._obey()
        super().close()

    # --- in the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._asked.wait()
                self._asked.clear()
                self._obey()
                self._carry()
        except BaseException as failure:  # a bug: the main thread tells the story
            self._failure = failure
            self._ended()

    def _obey(self) -> bool:
        """Do what was asked meanwhile; True if anything was."""
        asked = bool(self._orders)
        while self._orders:
            self._orders.popleft()()
        if asked:
            self._ended()  # what was begun may have ended at once
        return asked

    def _carry(self) -> None:
        """Until nothing is left to carry."""
        moved_s, sleep_s = time.perf_counter(), FIRST_SLEEP_S
        while self._moves and not self._closing:
            open_before = len(self._moves)
            moved = bool(super().progress())
            if len(self._moves) < open_before:
                self._ended()
            if self._obey() or moved:
                moved_s, sleep_s = time.perf_counter(), FIRST_SLEEP_S
                continue
            idle_s = time.perf_counter() - moved_s
            if idle_s < SPIN_S:
                os.sched_yield()
                continue
            time.sleep(sleep_s)
            sleep_s = min(2 * sleep_s, MOVING_SLEEP_S if idle_s < MOVING_S else LONGEST_SLEEP_S)
