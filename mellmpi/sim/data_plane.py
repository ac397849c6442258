"""Block transfers between simulated arenas, block by block over simulated time."""

from collections.abc import Callable

import numpy as np

from mellmpi.protocol import (
    BlocksArrived,
    BlocksSent,
    DataPlaneCommand,
    DrainBlocks,
    ReceiveBlocks,
    SendBlocks,
)
from mellmpi.sim.worker import SimWorker
from mellmpi.worker import BlockResult

Later = Callable[[float, Callable[[], None]], None]  # (delay in seconds, action)
Deliver = Callable[[SimWorker, BlockResult], None]
Key = tuple[int, int, int]  # source, destination, tag


class DataPlane:
    """Matches sends with receives by (source, tag), as MPI does.

    It asserts what MPI only requires: blocks in transfer are held, and blocks being sent are not
    written.
    """

    def __init__(
        self,
        workers: dict[int, SimWorker],
        block_s: Callable[[], float],
        later: Later,
        deliver: Deliver,
    ):
        self.workers, self.block_s, self.later, self.deliver = workers, block_s, later, deliver
        self.sends: dict[Key, SendBlocks] = {}
        self.receives: dict[Key, ReceiveBlocks | DrainBlocks] = {}
        self.started_s: dict[Key, float] = {}
        self._content: dict[Key, np.ndarray] = {}  # of the blocks when their send was posted
        self.corrupts: Callable[[], bool] = lambda: False  # whether the next round arrives wrong

    def handle(self, worker: SimWorker, order: DataPlaneCommand, now: float) -> None:
        """Start the transfer that a worker's batch scheduler orders, once both sides are ready."""
        match order:
            case SendBlocks(dst=dst, tag=tag):
                key = (worker.id, dst, tag)
                self.sends[key] = order
                self._content[key] = worker.executor.arena[list(order.block_ids)]
                if not self.workers[dst].alive:
                    return self.worker_lost(dst)
            case ReceiveBlocks(src=src, tag=tag) | DrainBlocks(src=src, tag=tag):
                key = (src, worker.id, tag)
                self.receives[key] = order
                self.started_s[key] = now
                if not self.workers[src].alive:
                    return self.worker_lost(src)
        if key in self.sends and key in self.receives:
            self._copy(key, 0)

    def _copy(self, key: Key, i: int) -> None:
        send, receive = self.sends.get(key), self.receives.get(key)
        if send is None or receive is None:
            return  # a worker was lost
        if i == len(send.block_ids):
            return self._finish(key, send, receive)
        source, destination = self.workers[key[0]], self.workers[key[1]]
        block = _held_block(source, send.block_ids[i])
        assert (block == self._content[key][i]).all(), f"{send} was written while it was sent"
        if isinstance(receive, ReceiveBlocks):
            _held_block(destination, receive.block_ids[i])[:] = block
        self.later(self.block_s(), lambda: self._copy(key, i + 1))

    def _finish(self, key: Key, send: SendBlocks, receive: ReceiveBlocks | DrainBlocks) -> None:
        del self.sends[key], self.receives[key], self._content[key]
        self._end_send(key, send)
        self._end_receive(key, receive, "checksum" if self.corrupts() else "")

    def _end_send(self, key: Key, send: SendBlocks) -> None:
        self.deliver(self.workers[key[0]], BlocksSent(send.request_id, send.epoch, send.tag))

    def _end_receive(self, key: Key, receive: ReceiveBlocks | DrainBlocks, reason: str) -> None:
        if isinstance(receive, ReceiveBlocks):
            arrived = BlocksArrived(
                receive.request_id,
                receive.epoch,
                not reason,
                self.started_s.pop(key),
                receive.tag,
                reason,
            )
            if reason:
                self.workers[key[1]].executor.arena[list(receive.block_ids)] = 0
            self.deliver(self.workers[key[1]], arrived)

    def worker_lost(self, worker: int) -> None:
        """End all transfers with this worker and notify their other side."""
        for key in [k for k in self.sends if worker in k[:2]]:
            self._end_send(key, self.sends.pop(key))
        for key in [k for k in self.receives if worker in k[:2]]:
            self._end_receive(key, self.receives.pop(key), "peer lost")


def _held_block(worker: SimWorker, block: int) -> np.ndarray:
    """Return the content of a block, which must be held."""
    assert worker.batch.pool.is_held(block), f"block {block} of worker {worker.id} is not held"
    return np.asarray(worker.executor.arena[block])
