"""mellmpi on a bad wire: `python -m tests.runtime.faulty WIRE ARGS…`, as `python -m mellmpi ARGS…`.

Of the blocks, streams and headers on their way between workers every seventh is hit, the first one
among them: a bit flips, a stream ends too early, a header claims another layout. WIRE is "memory",
as it is within a host, or "messages".
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mellmpi.cli import main
from mellmpi.protocol import KvPayload
from mellmpi.transport import Endpoint
from mellmpi.transport.blocks import checksum, receiving
from mellmpi.transport.blocks import cross_memory as reading

EVERY = 7


def every() -> Callable[[], bool]:
    """Of the calls with it: the first, and every seventh from there on."""
    calls = itertools.count()
    return lambda: next(calls) % EVERY == 0


def bit_flip(is_hit: Callable[[], bool]) -> None:
    """A bit of a block that has come is not as it was sent."""

    def flipped(data: memoryview) -> int:
        if is_hit():
            data[3] ^= 1
        return checksum(data)

    receiving.checksum = reading.checksum = flipped


def truncation(is_hit: Callable[[], bool]) -> None:
    """The stream ends a block before what its header announces."""
    send_blocks = Endpoint.send_blocks

    def truncating(self: Endpoint, dst: int, tag: int, block_ids: Sequence[int]) -> Any:
        cut = len(block_ids) > 1 and is_hit()
        return send_blocks(self, dst, tag, block_ids[:-1] if cut else block_ids)

    Endpoint.send_blocks = truncating  # type: ignore[method-assign]


def fingerprint(is_hit: Callable[[], bool]) -> None:
    """What comes claims to be of another layout."""
    send = Endpoint.send

    def claiming(self: Endpoint, dst: int, message: Any) -> None:
        if isinstance(message, KvPayload) and is_hit():
            message = replace(message, fingerprint="another")
        send(self, dst, message)

    Endpoint.send = claiming  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv.pop(1) == "messages":
        reading.Proof.holds = lambda packed: False  # type: ignore[method-assign]
    for plant in (bit_flip, truncation, fingerprint):
        plant(every())
    sys.exit(main())
