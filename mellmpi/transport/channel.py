"""The interface of non-blocking messages between workers, modelled on an MPI communicator."""

from typing import Any, Protocol

Request = Any  # handle of a non-blocking operation; only the channel looks into it
MatchedMessage = Any  # handle of a message that `match` has found; likewise


class LinkError(Exception):
    """The peer of a message is lost."""


class Channel(Protocol):
    """Non-blocking messages between memory buffers. Peers are workers. Raises LinkError.

    Never post a receive for a message that may be longer than its buffer (see `framing`): Open
    MPI 5 writes past the end of the buffer before it reports the error.
    """

    num_tags: int  # tags are compared modulo this number

    def send(self, address: int, num_bytes: int, dst: int, tag: int) -> Request: ...
    def receive(self, address: int, num_bytes: int, src: int, tag: int) -> Request: ...
    def match(self, src: int, tag: int) -> tuple[MatchedMessage, int] | None:
        """Return the next message and its size in bytes, or None if none has arrived.

        The caller must receive it with `receive_matched`.
        """
        ...

    def receive_matched(
        self, message: MatchedMessage, src: int, address: int, num_bytes: int
    ) -> Request: ...
    def finished(self, request: Request) -> int | None:
        """Return the number of bytes received once the request is complete, else None.

        A complete request must not be used again.
        """
        ...

    def cancel(self, request: Request) -> None:
        """Cancel a receive that has not been matched. It still has to be completed (`finished`)."""
        ...


class ByteChannel(Protocol):
    """Non-blocking messages of any size. Peers are workers. Raises LinkError."""

    def send_bytes(self, data: bytes, dst: int) -> Request: ...
    def take(self) -> tuple[int, bytearray, Request] | None:
        """Start to receive the next message of any source: (source, buffer, request), or None."""
        ...

    def test(self, request: Request) -> bool:
        """Return whether the request is complete; then it must not be used again."""
        ...


class PeerChannel(Channel, ByteChannel, Protocol):
    """Both kinds of messages, and the detection of failed peers."""

    error: Exception | None  # the first one

    def newly_failed(self) -> list[int]:
        """Return the peers that were found dead since the last call."""
        ...
