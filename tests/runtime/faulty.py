"""mellmpi with transfer faults: `python -m tests.runtime.faulty PATH ARGS…`.

ARGS are those of `python -m mellmpi`. Of the blocks, transfers and headers between workers, the
first and then every seventh is faulty: a flipped bit, a missing block, another layout. PATH is
"memory", as within a host, or "messages".
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
    """Return a function that is true at the first call and at every seventh after it."""
    calls = itertools.count()
    return lambda: next(calls) % EVERY == 0


def bit_flip(is_hit: Callable[[], bool]) -> None:
    """Flip a bit of a received block."""

    def flipped(data: memoryview) -> int:
        if is_hit():
            data[3] ^= 1
        return checksum(data)

    receiving.checksum = reading.checksum = flipped


def truncation(is_hit: Callable[[], bool]) -> None:
    """Send one block less than the header announces."""
    send_blocks = Endpoint.send_blocks

    def truncating(self: Endpoint, dst: int, tag: int, block_ids: Sequence[int]) -> Any:
        cut = len(block_ids) > 1 and is_hit()
        return send_blocks(self, dst, tag, block_ids[:-1] if cut else block_ids)

    Endpoint.send_blocks = truncating  # type: ignore[method-assign]


def fingerprint(is_hit: Callable[[], bool]) -> None:
    """Send a header with the fingerprint of another layout."""
    send = Endpoint.send

    def claiming(self: Endpoint, dst: int, message: Any) -> None:
        if isinstance(message, KvPayload) and is_hit():
            message = replace(message, fingerprint="another")
        send(self, dst, message)

    Endpoint.send = claiming  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv.pop(1) == "messages":
        reading.CmaProbe.readable = lambda packed: False  # type: ignore[method-assign]
    for plant in (bit_flip, truncation, fingerprint):
        plant(every())
    sys.exit(main())
