"""Blocks between simulated arenas, copied one by one while time goes on."""

from collections.abc import Callable
from typing import Any

import numpy as np

from mellmpi.protocol import BlocksArrived, BlocksSent, DrainBlocks, ReceiveBlocks, SendBlocks
from mellmpi.sim.worker import SimWorker

Later = Callable[[float, Callable[[], None]], None]  # (delay, what to do then)
Tell = Callable[[SimWorker, Any], None]  # an event of the data plane, to a worker
Key = tuple[int, int, int]  # source, destination, tag


class DataPlane:
    """Matches what is sent with what is awaited, as MPI matches (source, tag).

    It insists on what MPI only asks for: blocks in flight belong to somebody, and what is being
    sent is not written.
    """

    def __init__(
        self, workers: dict[int, SimWorker], block_s: Callable[[], float], later: Later, tell: Tell
    ):
        self.workers, self.block_s, self.later, self.tell = workers, block_s, later, tell
        self.sends: dict[Key, SendBlocks] = {}
        self.receives: dict[Key, ReceiveBlocks | DrainBlocks] = {}
        self.started_s: dict[Key, float] = {}
        self._as_sent: dict[Key, np.ndarray] = {}
        self.spoils: Callable[[], bool] = lambda: False  # does the next round arrive wrong?

    def handle(self, worker: SimWorker, order: Any, now: float) -> None:
        """One order of a worker's batch scheduler."""
        match order:
            case SendBlocks(dst=dst, tag=tag):
                key = (worker.id, dst, tag)
                self.sends[key] = order
                self._as_sent[key] = worker.executor.arena[list(order.block_ids)]
                if not self.workers[dst].alive:
                    return self.lost(dst)
            case ReceiveBlocks(src=src, tag=tag) | DrainBlocks(src=src, tag=tag):
                key = (src, worker.id, tag)
                self.receives[key] = order
                self.started_s[key] = now
                if not self.workers[src].alive:
                    return self.lost(src)
        if key in self.sends and key in self.receives:
            self._copy(key, 0)

    def _copy(self, key: Key, i: int) -> None:
        send, receive = self.sends.get(key), self.receives.get(key)
        if send is None or receive is None:
            return  # one side was lost
        if i == len(send.block_ids):
            return self._finish(key, send, receive)
        source, destination = self.workers[key[0]], self.workers[key[1]]
        block = _in_flight(source, send.block_ids[i])
        assert (block == self._as_sent[key][i]).all(), f"{send} was written while it was sent"
        if isinstance(receive, ReceiveBlocks):
            _in_flight(destination, receive.block_ids[i])[:] = block
        self.later(self.block_s(), lambda: self._copy(key, i + 1))

    def _finish(self, key: Key, send: SendBlocks, receive: ReceiveBlocks | DrainBlocks) -> None:
        del self.sends[key], self.receives[key], self._as_sent[key]
        self._tell_sent(key, send)
        self._tell_arrived(key, receive, "checksum" if self.spoils() else "")

    def _tell_sent(self, key: Key, send: SendBlocks) -> None:
        self.tell(self.workers[key[0]], BlocksSent(send.request_id, send.epoch, send.tag))

    def _tell_arrived(self, key: Key, receive: ReceiveBlocks | DrainBlocks, wrong: str) -> None:
        if isinstance(receive, ReceiveBlocks):
            arrived = BlocksArrived(
                receive.request_id,
                receive.epoch,
                not wrong,
                self.started_s.pop(key),
                receive.tag,
                wrong,
            )
            if wrong:
                self.workers[key[1]].executor.arena[list(receive.block_ids)] = 0
            self.tell(self.workers[key[1]], arrived)

    def lost(self, worker: int) -> None:
        """End every transfer with this worker; the other side hears of it."""
        for key in [k for k in self.sends if worker in k[:2]]:
            self._tell_sent(key, self.sends.pop(key))
        for key in [k for k in self.receives if worker in k[:2]]:
            self._tell_arrived(key, self.receives.pop(key), "peer lost")


def _in_flight(worker: SimWorker, block: int) -> np.ndarray:
    """The memory of a block that a transfer touches."""
    assert worker.batch.pool.is_held(block), f"block {block} of worker {worker.id} is nobody's"
    return np.asarray(worker.executor.arena[block])
