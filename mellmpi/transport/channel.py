"""Non-blocking messages between workers, as an MPI communicator has them."""

from typing import Any, Protocol


class LinkError(Exception):
    """The peer of a message is lost."""


class Channel(Protocol):
    """Non-blocking messages of bytes in memory. Peers are workers. Raises LinkError.

    A message is received once it has come and its size is known: Open MPI 5 writes what is too
    long for a posted buffer behind it, and only then reports it.
    """

    num_tags: int  # tags are told apart modulo this

    def send(self, address: int, num_bytes: int, dst: int, tag: int) -> Any: ...
    def match(self, src: int, tag: int) -> tuple[Any, int] | None:
        """The next message and its bytes, to be received; None if none has come."""
        ...

    def receive(self, message: Any, address: int, num_bytes: int) -> Any: ...
    def test(self, request: Any) -> bool:
        """It is done; then the request is used up."""
        ...


class ByteChannel(Protocol):
    """Non-blocking messages of any size. Peers are workers. Raises LinkError."""

    def send_bytes(self, data: bytes, dst: int) -> Any: ...
    def take(self) -> tuple[int, bytearray, Any] | None:
        """Begin to receive the next message from anyone: (source, its bytes to be, request)."""
        ...

    def test(self, request: Any) -> bool: ...
