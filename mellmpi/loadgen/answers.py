"""One answer: the events of its stream, and what was measured of it. Knows no HTTP and no clock.

TTFT   sending of the request → first chunk with text; a chunk with only a role is no text.
E2EL   sending of the request → last chunk with a choice, the one with the finish reason included.
ITL    gap between two chunks with text.
TPOT   (E2EL − TTFT) / (n − 1), for n ≥ 2 output tokens.

The number of output tokens is the server's: `usage`, asked for with `stream_options`. If the server
reports none, the tokenizer counts the text; without a tokenizer a chunk with text is one token.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

SHOWN = 200  # characters of an answer in an error
Count = Callable[[str], int]


class Failed(Exception):
    """The request has failed. `reason` is the same for alike failures, `detail` is of this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request that has ended. Times are in seconds; `start_s` is since the start of the run."""

    start_s: float
    prompt_tokens: int
    latency_s: float = 0.0  # E2EL; of a failed request, until it failed
    ttft_s: float = 0.0
    itl_s: tuple[float, ...] = ()  # one less than chunks with text
    output_tokens: int = 0
    counted_by: str = ""  # "usage", "tokenizer" or "chunks"
    text: str = ""
    reason: str = ""  # why the request failed; "" if it is complete
    detail: str = ""

    @property
    def tpot_s(self) -> float:
        """Seconds per output token after the first; 0 for an answer of a single token."""
        if self.output_tokens < 2:
            return 0.0
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def end_s(self) -> float:
        return self.start_s + self.latency_s

    @property
    def error(self) -> str:
        """Reason and detail; "" if the request is complete."""
        return ": ".join(filter(None, (self.reason, self.detail)))


@dataclass(slots=True)
class Answer:
    """What has come of one answer so far."""

    text_times_s: list[float] = field(default_factory=list)  # of chunks with text
    last_s: float | None = None  # of the last chunk with a choice
    texts: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None  # as the server reports them
    output_tokens: int | None = None
    is_finished: bool = False  # a finish reason has come
    is_done: bool = False  # [DONE] has come

    def take(self, data: str, now: float) -> None:
        """Handle the data of one event. Raises Failed for an error, or for anything unknown."""
        if data.strip() == "[DONE]":
            self.is_done = True
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Failed("an event is not JSON", data[:SHOWN]) from error
        try:
            self._chunk(chunk, now)
        except (AttributeError, TypeError) as error:
            raise Failed("an event is no OpenAI chunk", data[:SHOWN]) from error

    def _chunk(self, chunk: dict[str, Any], now: float) -> None:
        if error := chunk.get("error"):
            raise Failed("error in the answer", message_of(error))
        if usage := chunk.get("usage"):
            self.prompt_tokens = _whole(usage.get("prompt_tokens"), self.prompt_tokens)
            self.output_tokens = _whole(usage.get("completion_tokens"), self.output_tokens)
        if not (choices := chunk.get("choices")):
            return
        self.last_s = now
        if text := "".join(map(_text, choices)):
            self.text_times_s.append(now)
            self.texts.append(text)
        self.is_finished |= any(choice.get("finish_reason") for choice in choices)

    def outcome(self, start_s: float, prompt_tokens: int, count: Count | None) -> Outcome:
        """Return what was measured. Raises Failed if the answer is not complete.

        start_s        time of sending, on the clock of `take`
        prompt_tokens  used if the server reports none
        """
        if self.last_s is None:
            raise Failed("an answer without a choice")
        if not (self.is_finished or self.is_done):
            raise Failed("the stream ended early", "neither a finish reason nor [DONE] has come")
        text, times = "".join(self.texts), self.text_times_s or [self.last_s]
        tokens, counted_by = self._tokens(text, count)
        return Outcome(
            start_s,
            prompt_tokens if self.prompt_tokens is None else self.prompt_tokens,
            self.last_s - start_s,
            times[0] - start_s,
            tuple(b - a for a, b in pairwise(times)),
            tokens,
            counted_by,
            text,
        )

    def _tokens(self, text: str, count: Count | None) -> tuple[int, str]:
        if self.output_tokens is not None:
            return self.output_tokens, "usage"
        if count is not None:
            return count(text), "tokenizer"
        return len(self.texts), "chunks"


def message_of(error: Any) -> str:
    """Return the message of an OpenAI error, or of one of another form."""
    while isinstance(error, dict) and (inner := error.get("error") or error.get("message")):
        error = inner
    return (error if isinstance(error, str) else json.dumps(error))[:SHOWN]


def _text(choice: dict[str, Any]) -> str:
    """Return the text of a choice of any OpenAI form: completion, chat chunk or chat message."""
    if (text := choice.get("text")) is not None:
        return str(text)
    delta = choice.get("delta") or choice.get("message") or {}
    parts = [delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content")]
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        parts += [function.get("name"), function.get("arguments")]
    return "".join(filter(None, parts))


def _whole(value: Any, otherwise: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise
