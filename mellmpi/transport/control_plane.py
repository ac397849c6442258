"""The messages of one rank from the start of its job to its end, and collective calls made of them.

No rank ever blocks inside MPI to wait for another rank, because nothing could end such a wait.
Collective calls consist of messages, so a waiting rank also notices that a peer has died or that
the job has failed.
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
from mellmpi.transport.messages import Mailbox, Terminated

FAULT, USAGE = 1, 2  # exit codes; 2: a mistake that the user can correct
FIRST_PAUSE_S, LONGEST_PAUSE_S = 100e-6, 5e-3  # between polls during a gather; pauses double
FLUSH_S = 5.0  # longest wait for outgoing messages to be sent
SUSPICION_S = 10.0  # an MPI error that no lost rank explains within this time is raised
ANSWER_S = 5.0  # longest wait for terminated ranks to confirm, or for rank 0 to terminate us


class PeerFailed(Exception):
    """Another rank has failed, and the job cannot continue without it."""

    def __init__(self, exit_code: int, text: str):
        super().__init__(text)
        self.exit_code, self.text = exit_code, text


class ControlPlane:
    """Sends and receives messages of one rank: gathers, failures, termination. Used by one thread.

    While `starting`, the failure of any rank ends the job; later only a mistake of the user does.
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
        self._received: list[tuple[int, Any]] = []
        self._gathered: dict[int, deque[Any]] = defaultdict(deque)  # by source
        self._suspicious_s: float | None = None  # time of the first unexplained MPI error

    @property
    def busy(self) -> bool:
        """Messages are in flight that may need our progress."""
        return self._mailbox.busy

    def send(self, dst: int, message: Any) -> None:
        """Send a message; a message to a lost rank is dropped."""
        self._mailbox.send(dst, message)

    def poll(self) -> list[tuple[int, Any]]:
        """Take the messages that `receive` has collected."""
        received, self._received = self._received, []
        return received

    def unread(self, messages: list[tuple[int, Any]]) -> None:
        """Put messages back: the next `poll` returns them first."""
        self._received = messages + self._received

    def receive(self) -> bool:
        """Receive all messages that have arrived; True if there is anything for `poll`.

        A lost rank becomes one WorkerLost after the last of its messages. Ends this process if
        another rank terminates the job. Raises PeerFailed.
        """
        try:
            messages = self._mailbox.receive()
        except Terminated as order:
            self._end(order)
        for source, message in messages:
            self._sort(source, message)
        for rank in self._channel.newly_failed():
            for source, message in self._mailbox.drop_peer(rank):
                self._sort(source, message)
            self.lost.add(rank)
            self._received.append((rank, WorkerLost(rank)))
        self.check(self._channel.error)
        return bool(self._received)

    def _sort(self, source: int, message: Any) -> None:
        if isinstance(message, GatherPart | GatherWhole):
            self._gathered[source].append(message)
            return
        if isinstance(message, RankFailed) and (self.starting or message.exit_code == USAGE):
            raise PeerFailed(message.exit_code, message.text)
        self._received.append((source, message))

    def check(self, error: Exception | None) -> None:
        """Raise the first error of a channel, unless a rank is found lost within SUSPICION_S."""
        if error is None or self.lost:
            return
        self._suspicious_s = self._suspicious_s or time.monotonic()
        if time.monotonic() - self._suspicious_s > SUSPICION_S:
            raise error

    def flush(self, limit_s: float = FLUSH_S) -> None:
        """Wait until all messages have been sent, for `limit_s` at most."""
        stop_s = time.monotonic() + limit_s
        while self._mailbox.sending and time.monotonic() < stop_s:
            self.receive()
            time.sleep(FIRST_PAUSE_S)

    # --- collective calls: all ranks make them in the same order ---------------------------------

    def gather(self, data: bytes) -> list[bytes]:
        """Allgather: returns the data of every rank, by rank.

        Raises PeerFailed on rank 0 if any rank has died, on other ranks if rank 0 has; once the
        job serves, on all ranks if any rank has died.
        """
        others = range(1, self.size)
        if self.rank == 0:
            parts = [data, *(self._next_part(rank).data for rank in others)]
            for rank in others:
                self.send(rank, GatherWhole(tuple(parts)))
            self.flush()
            return parts
        self.send(0, GatherPart(data))
        return list(self._next_part(0).parts)

    def share(self, data: Any) -> Any:
        """Broadcast rank 0's plain data; the argument of other ranks is ignored."""
        names = "surrogateescape"  # Python decodes file names that are not UTF-8 in this way
        packed = msgpack.packb(data, unicode_errors=names) if self.rank == 0 else b""
        return msgpack.unpackb(self.gather(packed)[0], unicode_errors=names)

    def _next_part(self, source: int) -> Any:
        pause_s = FIRST_PAUSE_S
        while not self._gathered[source]:
            self.receive()
            if self._cannot_gather():
                raise PeerFailed(FAULT, f"mellmpi: rank {min(self.lost)} has died")
            time.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        return self._gathered[source].popleft()

    def _cannot_gather(self) -> bool:
        # At the start rank 0 terminates all other ranks. At the end it only exits.
        return bool(self.lost) if self.rank == 0 or not self.starting else 0 in self.lost

    # --- failure and termination -----------------------------------------------------------------

    def report_failure(self, exit_code: int, text: str) -> None:
        """Tell rank 0 why this rank ends."""
        self.send(0, RankFailed(exit_code, text))
        self.flush(1.0)

    def await_termination(self) -> None:
        """Wait until rank 0 ends this process. Returns after ANSWER_S, or if rank 0 has died."""
        stop_s = time.monotonic() + ANSWER_S
        while 0 not in self.lost and time.monotonic() < stop_s:
            self.receive()
            time.sleep(LONGEST_PAUSE_S)

    def terminate_others(self, exit_code: int) -> bool:
        """End the processes of all other ranks. Returns whether all of them have confirmed."""
        waiting = set(range(self.size)) - {self.rank} - self.lost
        for rank in waiting:
            self._mailbox.terminate(rank, exit_code)
        stop_s = time.monotonic() + ANSWER_S
        while waiting and time.monotonic() < stop_s:
            try:
                self._mailbox.receive()
            except Terminated as answer:
                waiting.discard(answer.source)
            waiting -= set(self._channel.newly_failed())
            time.sleep(FIRST_PAUSE_S)
        return not waiting

    def _end(self, order: Terminated) -> NoReturn:
        self._mailbox.terminate(order.source, order.exit_code)  # confirms
        try:
            self.flush(1.0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            self._leave(order.exit_code)
