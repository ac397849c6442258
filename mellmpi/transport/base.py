"""The interface of all transports. Addresses are workers: 0 is the scheduler, then 1, 2, 3 …"""

import time
from collections.abc import Sequence
from typing import Any, Protocol


class Arena(Protocol):
    """Memory of KV blocks: block i is the `block_bytes` bytes at `address + i * block_bytes`."""

    @property
    def address(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def device(self) -> str:
        """ "cpu", or a torch device: "cuda", "cuda:1"."""
        ...


class Transfer:
    """Handle of a transfer of blocks. Once it is `done`, the caller may use the blocks again.

    A transfer always ends, at the sender when the receiver has received or drained all blocks.
    `reason` says why it failed ("peer lost", "size", "truncated", "checksum"; empty: it has not).
    The contents of blocks that a failed transfer should have received are undefined.
    """

    def __init__(self) -> None:
        self.done = False
        self.reason = ""
        self.num_bytes = 0  # moved so far
        self.started_s = time.perf_counter()
        self._ended_s = 0.0

    @property
    def failed(self) -> bool:
        return bool(self.reason)

    def fail(self, reason: str) -> None:
        """For transports: the transfer will end as failed. The first reason stays."""
        self.reason = self.reason or reason

    @property
    def elapsed_s(self) -> float:
        """Seconds from the start to the end, or to now if it has not ended.

        The start is the call that began the transfer; for a receive, the arrival of its first
        message if the transport can tell.
        """
        return (self._ended_s if self.done else time.perf_counter()) - self.started_s

    def begin(self) -> None:
        """For transports: the first message has arrived; restart the clock."""
        self.started_s = time.perf_counter()

    def end(self) -> None:
        """For transports: the blocks will not be accessed any more."""
        self._ended_s = time.perf_counter()
        self.done = True  # last: another thread may read it


class Transport(Protocol):
    """Messages and KV blocks between the scheduler and the workers of one job.

    Used from one thread, except `wake`, which any thread may call. Only `wait` and `close` block.
    Messages from one address to another stay in order, and so do the blocks of one tag. There is no
    order between different links, between different tags, or between messages and blocks.
    """

    worker: int  # own address
    num_workers: int  # their addresses are 1 … num_workers

    def send(self, dst: int, message: Any) -> None:
        """Send a `mellmpi.protocol` message; a message to a lost worker is dropped."""
        ...

    def poll(self) -> list[tuple[int, Any]]:
        """Return all received messages as (source, message), in the order of each link.

        The loss of a worker is reported once, as (worker, WorkerLost(worker)), after the last
        messages of that worker.
        """
        ...

    def unread(self, messages: list[tuple[int, Any]]) -> None:
        """Put messages back: the next `poll` returns them first."""
        ...

    def attach(self, arena: Arena | None) -> None:
        """Set the arena for all following transfers (None: no arena).

        No transfers except drains may be in progress.
        """
        ...

    def send_blocks(self, dst: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        """Send these blocks in this order. They must not change until the transfer is done."""
        ...

    def receive_blocks(self, src: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        """Receive the blocks that `src` sends under `tag`, the i-th into `block_ids[i]`."""
        ...

    def drain_blocks(self, src: int, tag: int, num_blocks: int) -> Transfer:
        """Receive and discard one transfer with blocks of any size; needs no arena."""
        ...

    def progress(self) -> bool:
        """Advance all transfers for a bounded time. Returns whether anything moved."""
        ...

    def wait(self, timeout_s: float, descriptors: Sequence[int] = ()) -> None:
        """Advance transfers and sleep until a message may have arrived, a transfer has ended,
        `wake` was called, one of the file descriptors is readable, or `timeout_s` has passed.
        Spurious returns are allowed."""
        ...

    def wake(self) -> None:
        """End the current `wait`, or the next one. Callable from any thread."""
        ...

    def close(self) -> None:
        """Flush outgoing messages (for a bounded time) and end all transfers."""
        ...
