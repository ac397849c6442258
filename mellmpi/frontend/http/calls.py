"""Calls that are being answered: their outputs, and the responses that wait for news of them."""

import asyncio
import math
import time
from collections.abc import Callable

from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.openai import Call
from mellmpi.frontend.outputs import outputs_of
from mellmpi.frontend.tokenizer import Tokenizer
from mellmpi.protocol import Cancel, Emit, OpenCall, Rejected

LONGEST_LAG_S = 0.04  # of tokens on their way to clients, to put more of them into one event
BUSY = 0.1  # share of the time in passes from which on a server is busy


class LiveCall:
    """One call with its outputs. A function of the messages: any API server makes the same."""

    def __init__(
        self,
        opened: OpenCall,
        call: Call,
        tokenizer: Tokenizer,
        send: Callable[[Cancel], None],
    ):
        self.opened, self.call, self.tokenizer = opened, call, tokenizer
        self._send = send
        self.outputs = outputs_of(call, tokenizer)
        self.error: BadRequest | None = None
        self.readers: set[News] = set()
        self.first_s: float | None = None  # monotonic time of the first token
        self._open = set(range(len(self.outputs)))  # choices whose request has not ended

    @property
    def done(self) -> bool:
        """Whether there will be no more news."""
        return self.error is not None or not self._open

    @property
    def has_news(self) -> bool:
        """Whether any token or error has arrived."""
        return self.done or any(output.tokens for output in self.outputs)

    def take(self, emit: Emit) -> None:
        """Add tokens. Cancels the request if a stop string ends its answer."""
        index = self.opened.request_ids.index(emit.request_id)
        output = self.outputs[index]
        if self.first_s is None and emit.tokens:
            self.first_s = time.monotonic()
        try:
            output.take(emit)
        except Exception as error:  # must not affect other calls
            self.fail(BadRequest(f"an internal error ({error})", code="internal_error", status=500))
            raise
        if output.finish_reason is not None and index in self._open:
            self._open.discard(index)
            if emit.finish_reason is None:
                self._send(Cancel(emit.request_id, "stop"))

    def reject(self, rejected: Rejected) -> None:
        """End the call: one of its requests cannot be served."""
        index = self.opened.request_ids.index(rejected.request_id)
        self._open.discard(index)
        self.fail(refusal(rejected))

    def fail(self, error: BadRequest) -> None:
        """End the call with an error, and cancel what is still being computed."""
        self.error = self.error or error
        self.cancel()

    def cancel(self) -> None:
        """Tell the scheduler that nobody waits for the rest."""
        for index in sorted(self._open):
            self._send(Cancel(self.opened.request_ids[index], "gone"))
        self._open.clear()


def refusal(rejected: Rejected) -> BadRequest:
    """Return the HTTP error for a request that the scheduler refused."""
    if not rejected.retry_after_s:
        return BadRequest(rejected.reason, code="rejected", status=503)
    headers = (("Retry-After", str(math.ceil(rejected.retry_after_s))),)
    return BadRequest(rejected.reason, code="overloaded", status=429, headers=headers)


class News:
    """Wakes one response. `asyncio.wait_for` would make a task for every event of a stream."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiter: asyncio.Future[bool] | None = None

    def set(self) -> None:
        """There is news."""
        self._is_set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(True)

    def clear(self) -> None:
        """Forget the news so far."""
        self._is_set = False

    async def wait(self, limit_s: float | None = None) -> bool:
        """Wait until there is news, and forget it. Returns False if `limit_s` passes first."""
        if not self._is_set:
            loop = asyncio.get_running_loop()
            waiter = self._waiter = loop.create_future()
            timer = None if limit_s is None else loop.call_later(limit_s, _expire, waiter)
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        found, self._is_set = self._is_set, False
        return found


def _expire(waiter: asyncio.Future[bool]) -> None:
    if not waiter.done():
        waiter.set_result(False)


class Pacer:
    """Wakes the responses of calls with news: at once in an idle server, in batches in a busy one.

    An event costs the same with one token or with four. In a busy server a pass over all calls
    with news begins LONGEST_LAG_S after the one before.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._changed: dict[LiveCall, None] = {}
        self._began_s, self._next_s = 0.0, 0.0
        self._scheduled = False

    def changed(self, call: LiveCall) -> None:
        """There is news of this call."""
        self._changed[call] = None
        if not self._scheduled:
            self._scheduled = True
            # Even at once means after the messages that are in the pipe already.
            self._loop.call_at(max(self._next_s, self._loop.time()), self._run)

    def _run(self) -> None:
        began_s = self._loop.time()
        for call in self._changed:
            for reader in call.readers:
                reader.set()
        self._changed.clear()
        self._scheduled = False
        since_s, self._began_s = began_s - self._began_s, began_s
        self._next_s = began_s + LONGEST_LAG_S
        # The responses run before this call, which stands behind them in the loop's queue.
        self._loop.call_soon(self._ended, since_s)

    def _ended(self, since_s: float) -> None:
        """`since_s`: from the pass before to this one."""
        if self._loop.time() - self._began_s < BUSY * since_s:
            self._next_s = self._began_s
