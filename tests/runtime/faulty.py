"""mellmpi on a bad wire: `python -m tests.runtime.faulty ARGS…`, as `python -m mellmpi ARGS…`.

Of the blocks, streams and headers on their way between workers every seventh is hit, the first one
among them: a bit flips, a stream ends too early, a header claims another layout.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mellmpi.cli import main
from mellmpi.protocol import KvPayload
from mellmpi.transport.endpoint import Endpoint
from mellmpi.transport.lanes import bytes_at
from mellmpi.transport.moves import Message, Receiving

EVERY = 7


def every() -> Callable[[], bool]:
    """Of the calls with it: the first, and every seventh from there on."""
    calls = itertools.count()
    return lambda: next(calls) % EVERY == 0


def bit_flip(is_hit: Callable[[], bool]) -> None:
    """A bit of a block that has come is not as it was sent."""
    finish = Receiving._finish

    def flipping(self: Receiving, message: Message) -> None:
        if message.block_id is not None and is_hit():
            bytes_at(message.address, message.num_bytes)[3] ^= 1
        finish(self, message)

    Receiving._finish = flipping  # type: ignore[method-assign]


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
    for plant in (bit_flip, truncation, fingerprint):
        plant(every())
    sys.exit(main())
