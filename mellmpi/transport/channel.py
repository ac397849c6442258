"""Non-blocking messages between workers, as an MPI communicator has them."""

from typing import Any, Protocol


class LinkError(Exception):
    """The peer of a message is lost."""


class Channel(Protocol):
    """Non-blocking messages of bytes in memory. Peers are workers. Raises LinkError.

    Post no receive whose message may be longer, see `framing`: Open MPI 5 writes what is too long
    for a posted buffer behind it, and only then reports it.
    """

    num_tags: int  # tags are told apart modulo this

    def send(self, address: int, num_bytes: int, dst: int, tag: int) -> Any: ...
    def receive(self, address: int, num_bytes: int, src: int, tag: int) -> Any: ...
    def match(self, src: int, tag: int) -> tuple[Any, int] | None:
        """The next message and its bytes, to be received; None if none has come."""
        ...

    def receive_matched(self, message: Any, src: int, address: int, num_bytes: int) -> Any: ...
    def finished(self, request: Any) -> int | None:
        """Once it is done, the bytes that were received; then the request is used up."""
        ...

    def cancel(self, request: Any) -> None:
        """Give a receive up, if nothing has come for it; `finished` tells as before."""
        ...


class ByteChannel(Protocol):
    """Non-blocking messages of any size. Peers are workers. Raises LinkError."""

    def send_bytes(self, data: bytes, dst: int) -> Any: ...
    def take(self) -> tuple[int, bytearray, Any] | None:
        """Begin to receive the next message from anyone: (source, its bytes to be, request)."""
        ...

    def test(self, request: Any) -> bool: ...


class PeerChannel(Channel, ByteChannel, Protocol):
    """Both kinds of messages, and news of the peers."""

    error: Exception | None  # the first one

    def newly_failed(self) -> list[int]:
        """Peers found dead since the last call."""
        ...
