"""The calls of all API servers with their tokens, so that any of them can be continued.

Pure: messages in, messages out; time is an argument.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mellmpi.protocol import (
    AttachCall,
    CallUnknown,
    Cancel,
    Emit,
    OpenCall,
    PromptLogprob,
    Rejected,
    TokenLogprob,
)

LEFT = "the client that began this stream left before its end"
KEPT_S = 60.0  # of a call after its end
ORPHAN_S = 30.0  # a stream whose API server has died is cancelled if no client continues it


@dataclass(slots=True)
class _Answer:
    """What is known of one request."""

    call: OpenCall
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    finish_reason: str | None = None
    rejected: Rejected | None = None
    ended: bool = False
    cut_off: bool = False  # it ended because its client left


@dataclass(slots=True)
class _Logged:
    """A call, and the API servers that take its tokens."""

    call: OpenCall
    servers: set[int]
    ended_s: float | None = None
    orphaned_s: float | None = None  # when its last API server died


class CallLog:
    """Keeps every token of calls until KEPT_S after their end."""

    def __init__(self) -> None:
        self._calls: dict[str, _Logged] = {}
        self._answers: dict[int, _Answer] = {}  # by request id
        self._ended: dict[str, float] = {}  # in the order of their ends

    @property
    def num_open(self) -> int:
        """Number of calls that have not ended."""
        return len(self._calls) - len(self._ended)

    def open(self, server: int, call: OpenCall) -> None:
        """A call has been opened by this API server."""
        self._calls[call.call_id] = _Logged(call, {server})
        for request_id in call.request_ids:
            self._answers[request_id] = _Answer(call)

    def servers(self, request_id: int) -> set[int]:
        """API servers that take the tokens of this request."""
        answer = self._answers.get(request_id)
        return self._calls[answer.call.call_id].servers if answer else set()

    def emitted(self, emit: Emit, now: float) -> None:
        """Log tokens."""
        if (answer := self._answers.get(emit.request_id)) is None:
            return
        answer.tokens += emit.tokens
        answer.logprobs += emit.logprobs
        answer.prompt_logprobs += emit.prompt_logprobs
        if emit.finish_reason is not None:
            answer.finish_reason = emit.finish_reason
            self._end(answer, now)

    def rejected(self, rejected: Rejected, now: float) -> None:
        """Log the end of a request that cannot be served."""
        if (answer := self._answers.get(rejected.request_id)) is not None:
            answer.rejected = rejected
            self._end(answer, now)

    def cancelled(self, request_id: int, now: float, reason: str = "gone") -> None:
        """Log that no more tokens of a request are needed. `reason`: see `Cancel`."""
        if (answer := self._answers.get(request_id)) is not None:
            answer.cut_off |= reason == "gone" and not answer.ended
            self._end(answer, now)

    def _end(self, answer: _Answer, now: float) -> None:
        if answer.ended:
            return
        answer.ended = True
        call = answer.call
        if all(self._answers[request_id].ended for request_id in call.request_ids):
            self._calls[call.call_id].ended_s = now
            self._ended.setdefault(call.call_id, now)

    def attach(self, server: int, asked: AttachCall) -> Iterator[Any]:
        """Yield the messages that let this API server continue a call."""
        logged = self._calls.get(asked.call_id)
        if logged is None or logged.call.owner != asked.owner:
            yield CallUnknown(asked.call_id)
            return
        logged.servers.add(server)
        logged.orphaned_s = None
        yield logged.call
        for request_id in logged.call.request_ids:
            yield from self._replay(request_id, self._answers[request_id])

    def _replay(self, request_id: int, answer: _Answer) -> Iterator[Emit | Rejected]:
        if answer.tokens or answer.finish_reason:
            tokens, logprobs = tuple(answer.tokens), tuple(answer.logprobs)
            reason, scored = answer.finish_reason, answer.prompt_logprobs
            yield Emit(request_id, 0, tokens, logprobs, reason, scored)
        if answer.rejected is not None:
            yield answer.rejected
        elif answer.cut_off:
            yield Rejected(request_id, LEFT, 0.0)

    def server_died(self, server: int, now: float) -> list[Cancel]:
        """Forget a server. Returns the requests that nobody can continue: those of bodies."""
        cancels: list[Cancel] = []
        for logged in list(self._calls.values()):
            if server not in logged.servers:
                continue
            logged.servers.discard(server)
            if logged.servers or logged.ended_s is not None:
                continue
            if logged.call.stream:
                logged.orphaned_s = now
            else:
                cancels += self._cancel(logged, now)
        return cancels

    def expire(self, now: float) -> list[Cancel]:
        """Forget calls that ended long ago. Returns the requests of orphans, to cancel."""
        for call_id, ended_s in list(self._ended.items()):
            if ended_s > now - KEPT_S:
                break
            del self._ended[call_id]
            for request_id in self._calls.pop(call_id).call.request_ids:
                del self._answers[request_id]
        orphans = [
            logged
            for logged in self._calls.values()
            if logged.orphaned_s is not None and logged.orphaned_s <= now - ORPHAN_S
        ]
        return [cancel for logged in orphans for cancel in self._cancel(logged, now)]

    def _cancel(self, logged: _Logged, now: float) -> list[Cancel]:
        logged.orphaned_s = None
        ids = [i for i in logged.call.request_ids if not self._answers[i].ended]
        for request_id in ids:
            self.cancelled(request_id, now)
        return [Cancel(request_id, "gone") for request_id in ids]
