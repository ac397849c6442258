"""What every transport promises. Addresses are workers: 0 is the scheduler, then 1, 2, 3 …"""

import time
from collections.abc import Sequence
from typing import Any, Protocol


class Arena(Protocol):
    """Where KV blocks live: block i is the `block_bytes` from `address + i * block_bytes` on."""

    @property
    def address(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def device(self) -> str:
        """ "cpu", or a device in torch's words: "cuda", "cuda:1"."""
        ...


class Transfer:
    """Blocks on their way. Once `done`, the blocks are the caller's again.

    At the sender, too, it ends when the receiver (or its drain) has taken in all that was sent.
    A transfer always ends. Where it failed, `reason` says why ("peer lost", "size": of a block,
    "truncated", "checksum"), and blocks to receive hold anything.
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
        """For transports: it will end as failed. The first reason stays."""
        self.reason = self.reason or reason

    @property
    def elapsed_s(self) -> float:
        """Seconds to its end, or to now: from the call that began it, or, where it was awaited
        and the transport can tell, from when the first of it came."""
        return (self._ended_s if self.done else time.perf_counter()) - self.started_s

    def begin(self) -> None:
        """For transports: only now does anything come."""
        self.started_s = time.perf_counter()

    def end(self) -> None:
        """For transports: nothing more will happen to the blocks."""
        self._ended_s = time.perf_counter()
        self.done = True  # last: another thread may look


class Transport(Protocol):
    """Messages and KV blocks between the scheduler and the workers of one job.

    Used from one thread; only `wake` may be called from any. Nothing but `wait` and `close` waits.
    Between two addresses messages stay in order, and so do the blocks of one tag; different links,
    different tags, and messages against blocks are not ordered.
    """

    worker: int  # own address
    num_workers: int  # their addresses are 1 … num_workers

    def send(self, dst: int, message: Any) -> None:
        """Send a `mellmpi.protocol` message; to a lost worker it is dropped."""
        ...

    def poll(self) -> list[tuple[int, Any]]:
        """All messages that have come, as (source, message), in the order of each link.

        A lost worker shows up once, as (that worker, WorkerLost(that worker)), after the messages
        it still got out; nothing comes from it afterwards.
        """
        ...

    def unread(self, messages: list[tuple[int, Any]]) -> None:
        """The next `poll` returns these first: they came to somebody who does not want them."""
        ...

    def attach(self, arena: Arena | None) -> None:
        """Send blocks from and receive them into this arena from now on (None: no arena).

        No transfer but drains may be under way.
        """
        ...

    def send_blocks(self, dst: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        """Send these blocks, in this order; they must not change until the transfer is done."""
        ...

    def receive_blocks(self, src: int, tag: int, block_ids: Sequence[int]) -> Transfer:
        """Receive as many blocks as `src` sends under `tag`, the i-th into `block_ids[i]`."""
        ...

    def drain_blocks(self, src: int, tag: int, num_blocks: int) -> Transfer:
        """Receive that many blocks of any size and throw them away; needs no arena."""
        ...

    def progress(self) -> bool:
        """Carry transfers a bounded piece further; True if anything moved."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Carry transfers on and sleep until something may have come, a transfer has ended, `wake`
        was called, or the time is over. May return early for no reason."""
        ...

    def wake(self) -> None:
        """From any thread: end the `wait` that is under way, or the next one."""
        ...

    def close(self) -> None:
        """Send out what was promised to live workers (for a bounded time), end all transfers."""
        ...
