"""The messages of one rank from the start of its job to its end, and the calls that all ranks make.

No rank ever waits inside MPI for another one, where nothing could end the wait: a gather is made of
messages, and a rank that waits for one also sees that a peer has died, or that the job has failed.
"""

import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NoReturn

import msgpack

from mellmpi.protocol import GatherPart, GatherWhole, RankFailed, WorkerLost
from mellmpi.transport.channel import PeerChannel
from mellmpi.transport.messages import Dismissed, Mailbox

FAULT, USAGE = 1, 2  # exit codes; 2: the user can do something about it
FIRST_PAUSE_S, LONGEST_PAUSE_S = 100e-6, 5e-3  # between looks during a gather; pauses double
FLUSH_S = 5.0  # longest wait for messages to leave
SUSPICION_S = 10.0  # an error of MPI that no lost rank explains by then is raised
ANSWER_S = 5.0  # longest wait for ranks that were dismissed to confirm, or for rank 0 to dismiss


class PeerFailed(Exception):
    """Another rank has failed, and the job cannot go on without it."""

    def __init__(self, exit_code: int, text: str):
        super().__init__(text)
        self.exit_code, self.text = exit_code, text


class Post:
    """Sends and receives messages of one rank. Used from one thread.

    While `starting`, the failure of any rank ends the job; later only the user's mistakes do.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        channel: PeerChannel,
        leave: Callable[[int], NoReturn] = os._exit,
    ):
        self.rank, self.size = rank, size
        self.lost: set[int] = set()
        self.starting = True
        self._channel, self._leave = channel, leave
        self._mailbox = Mailbox(channel)
        self._ready: list[tuple[int, Any]] = []
        self._gathered: dict[int, deque[Any]] = defaultdict(deque)  # by source
        self._suspicious_s: float | None = None  # since when an error of MPI is unexplained

    @property
    def busy(self) -> bool:
        """Messages are under way that may need progress."""
        return self._mailbox.busy

    def send(self, dst: int, message: Any) -> None:
        """Send a message; to a lost rank it is dropped."""
        self._mailbox.send(dst, message)

    def poll(self) -> list[tuple[int, Any]]:
        """Take the messages that `look` has found."""
        ready, self._ready = self._ready, []
        return ready

    def unread(self, messages: list[tuple[int, Any]]) -> None:
        """Put messages back: the next `poll` returns them first."""
        self._ready = messages + self._ready

    def look(self) -> bool:
        """Take in what has come; True if there is anything for `poll`.

        A lost rank becomes one WorkerLost, behind the messages that it still got out. Ends this
        process if the job is being ended. Raises PeerFailed.
        """
        try:
            came = self._mailbox.look()
        except Dismissed as order:
            self._end(order)
        for source, message in came:
            self._sort(source, message)
        for rank in self._channel.newly_failed():
            for source, message in self._mailbox.forget(rank):
                self._sort(source, message)
            self.lost.add(rank)
            self._ready.append((rank, WorkerLost(rank)))
        self.check(self._channel.error)
        return bool(self._ready)

    def _sort(self, source: int, message: Any) -> None:
        if isinstance(message, GatherPart | GatherWhole):
            self._gathered[source].append(message)
            return
        if isinstance(message, RankFailed) and (self.starting or message.exit_code == USAGE):
            raise PeerFailed(message.exit_code, message.text)
        self._ready.append((source, message))

    def check(self, error: Exception | None) -> None:
        """Raise the first error of a channel, unless the loss of a rank explains it in time."""
        if error is None or self.lost:
            return
        self._suspicious_s = self._suspicious_s or time.monotonic()
        if time.monotonic() - self._suspicious_s > SUSPICION_S:
            raise error

    def flush(self, limit_s: float = FLUSH_S) -> None:
        """Wait until all messages have left, `limit_s` at most."""
        stop_s = time.monotonic() + limit_s
        while self._mailbox.leaving and time.monotonic() < stop_s:
            self.look()
            time.sleep(FIRST_PAUSE_S)

    # --- calls that all ranks make, in the same order --------------------------------------------

    def gather(self, data: bytes) -> list[bytes]:
        """Exchange data: returns that of every rank, by rank.

        Raises PeerFailed at rank 0 if a rank has died, elsewhere if rank 0 has.
        """
        others = range(1, self.size)
        if self.rank == 0:
            parts = [data, *(self._hear(rank).data for rank in others)]
            for rank in others:
                self.send(rank, GatherWhole(tuple(parts)))
            self.flush()
            return parts
        self.send(0, GatherPart(data))
        return list(self._hear(0).parts)

    def share(self, data: Any) -> Any:
        """Give rank 0's plain data to every rank; the data of other ranks is ignored."""
        names = "surrogateescape"  # as Python reads names of files that are no UTF-8
        packed = msgpack.packb(data, unicode_errors=names) if self.rank == 0 else b""
        return msgpack.unpackb(self.gather(packed)[0], unicode_errors=names)

    def _hear(self, source: int) -> Any:
        pause_s = FIRST_PAUSE_S
        while not self._gathered[source]:
            self.look()
            if self._cannot_gather():
                raise PeerFailed(FAULT, f"mellmpi: rank {min(self.lost)} has died")
            time.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        return self._gathered[source].popleft()

    def _cannot_gather(self) -> bool:
        # At the start rank 0 ends the job, and tells all other ranks. At the end it just leaves.
        return bool(self.lost) if self.rank == 0 or not self.starting else 0 in self.lost

    # --- the hard ends ---------------------------------------------------------------------------

    def report_failure(self, exit_code: int, text: str) -> None:
        """Tell rank 0 why this rank ends."""
        self.send(0, RankFailed(exit_code, text))
        self.flush(1.0)

    def await_dismissal(self) -> None:
        """Wait until rank 0 ends this process. Returns if rank 0 does not, or has died."""
        stop_s = time.monotonic() + ANSWER_S
        while 0 not in self.lost and time.monotonic() < stop_s:
            self.look()
            time.sleep(LONGEST_PAUSE_S)

    def dismiss(self, exit_code: int) -> bool:
        """End the processes of all other ranks. False: not all of them have confirmed."""
        waiting = set(range(self.size)) - {self.rank} - self.lost
        for rank in waiting:
            self._mailbox.dismiss(rank, exit_code)
        stop_s = time.monotonic() + ANSWER_S
        while waiting and time.monotonic() < stop_s:
            try:
                self._mailbox.look()
            except Dismissed as answer:
                waiting.discard(answer.source)
            waiting -= set(self._channel.newly_failed())
            time.sleep(FIRST_PAUSE_S)
        return not waiting

    def _end(self, order: Dismissed) -> NoReturn:
        self._mailbox.dismiss(order.source, order.exit_code)  # confirms
        try:
            self.flush(1.0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            self._leave(order.exit_code)
