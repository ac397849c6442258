"""Batch files in OpenAI's format: reads lines of requests, writes a line per complete answer."""

import hashlib
import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mellmpi.files import Line, LineReader
from mellmpi.frontend.answers import answer_body
from mellmpi.frontend.fields import BadRequest
from mellmpi.frontend.openai import CHAT, COMPLETIONS, Call, parse
from mellmpi.frontend.outputs import Output, outputs_of
from mellmpi.frontend.served import ServedModels
from mellmpi.protocol import Emit, Rejected, Request

log = logging.getLogger(__name__)
Json = dict[str, Any]

# Valid inside a JSON string, but Python's `splitlines`, among others, ends a line at each of them.
ESCAPED_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


@dataclass(frozen=True, slots=True)
class Answered:
    """One line of the input with its result, or with new text, for the progress display."""

    number: int  # line of the input, from 1
    custom_id: str | None
    prompt: str  # to display: the prompt, or the last message of a chat
    text: str  # of the first choice; empty if the line failed
    error: str | None


@dataclass(slots=True)
class _Pending:
    """A line with requests in progress."""

    number: int
    custom_id: str
    prompt: str
    call: Call
    request_ids: tuple[int, ...]
    outputs: list[Output]


@dataclass(slots=True)
class Counts:
    """Counts of the input lines so far."""

    completed: int = 0
    failed: int = 0
    skipped: int = 0  # answered by an earlier run
    reasons: Counter[str] = field(default_factory=Counter)  # error code -> lines that failed
    examples: dict[str, str] = field(default_factory=dict)  # error code -> its first message

    @property
    def lines(self) -> int:
        return self.completed + self.failed + self.skipped

    def fail(self, code: str, message: str) -> None:
        """Count a line that failed."""
        self.failed += 1
        self.reasons[code] += 1
        self.examples.setdefault(code, message)


@dataclass
class BatchJob:
    """A batch: yields requests, takes their tokens, writes the answers. A `RequestSource`.

    Never blocks: if the input is a pipe, `requests` ends when no line is available yet, and can be
    called again until `exhausted`. Take only as many requests as the scheduler can use: each one
    is tokenized. Every answer is written with one call as soon as its last token is known.
    """

    lines: LineReader
    write: Callable[[bytes], Any]
    served: ServedModels
    finished: frozenset[str] = frozenset()  # custom_ids to skip
    on_answer: Callable[[Answered], None] = lambda _: None
    on_text: Callable[[Answered], None] | None = None  # its `text` is new text of a first choice
    now: Callable[[], float] = time.time  # unix seconds, for `created`
    parse_call: Callable[..., Call] | None = None  # with the arguments of `parse`; None: `parse`
    write_failure: Callable[[bytes], Any] | None = None  # lines that failed; None: `write`
    counts: Counts = field(default_factory=Counts)
    _ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _seen: dict[str, int] = field(default_factory=dict)  # custom_id -> line number
    _drawn: list[Request] = field(default_factory=list)  # of the current line, in reverse order
    _open: dict[int, tuple[_Pending, int]] = field(default_factory=dict)  # id -> (line, choice)

    @property
    def exhausted(self) -> bool:
        """Whether every request has been yielded."""
        return self.lines.exhausted and not self._drawn

    @property
    def done(self) -> bool:
        """Whether every line of the input is answered."""
        return self.exhausted and not self._open

    def requests(self) -> Iterator[Request]:
        """Yield requests to submit. Invalid lines are answered with an error immediately."""
        while True:
            while self._drawn:
                yield self._drawn.pop()
            line = self.lines.next()
            if line is None:
                return
            self._drawn = self._read_line(line)[::-1]

    def emit(self, event: Emit) -> tuple[int, ...]:
        """Take new tokens. Returns ids of requests to cancel, as after a stop string."""
        if event.request_id not in self._open:
            return ()  # sent before the request was cancelled
        pending, choice = self._open[event.request_id]
        output = pending.outputs[choice]
        try:
            grown = output.take(event)
            if self.on_text is not None and choice == 0 and grown:
                line_of = pending.number, pending.custom_id, pending.prompt
                self.on_text(Answered(*line_of, grown, None))
            if output.finish_reason is None:
                return ()
            ended = all(output.finish_reason for output in pending.outputs)
            line = self._answer_line(pending) if ended else None
        except Exception as error:
            left = self._drop(pending, _internal_error(pending.custom_id, error))
            return tuple(i for i in left if i != event.request_id or not event.finish_reason)
        del self._open[event.request_id]
        if line is not None:
            self._complete(pending, line)
        return () if event.finish_reason else (event.request_id,)

    def rejected(self, event: Rejected) -> tuple[int, ...]:
        """Fail the line of a rejected request. Returns ids of its other choices, to cancel."""
        if event.request_id not in self._open:
            return ()
        pending, _ = self._open[event.request_id]
        left = self._drop(pending, BadRequest(event.reason, code="rejected"))
        return tuple(i for i in left if i != event.request_id)

    def _drop(self, pending: _Pending, error: BadRequest) -> tuple[int, ...]:
        """Fail a line. Returns ids of its requests that were still open."""
        left = tuple(i for i in pending.request_ids if self._open.pop(i, None) is not None)
        self._fail(pending.number, pending.custom_id, error)
        return left

    # --- one line --------------------------------------------------------------------------------

    def _read_line(self, line: Line) -> list[Request]:
        if line.is_blank:
            return []
        custom_id = None
        try:
            entry = parse_line(line)
            custom_id = _custom_id(entry)
            if self._is_answered_before(custom_id, line.number):
                return []
            return self._start(line.number, custom_id, entry)
        except BadRequest as error:
            self._fail(line.number, custom_id, error)
        except Exception as error:  # must not affect other lines
            self._fail(line.number, custom_id, _internal_error(custom_id, error))
        return []

    def _is_answered_before(self, custom_id: str, number: int) -> bool:
        first = self._seen.setdefault(custom_id, number)
        if first != number:
            raise BadRequest(
                f"custom_id {custom_id!r} was already used on line {first}",
                "custom_id",
                "duplicate_custom_id",
            )
        self.counts.skipped += custom_id in self.finished
        return custom_id in self.finished

    def _start(self, number: int, custom_id: str, entry: Json) -> list[Request]:
        url, body = _url_and_body(entry)
        call = (self.parse_call or parse)(url, body, self.served, custom_id)
        if call.stream:
            raise BadRequest("a batch cannot stream; leave stream out", "stream")
        requests = call.requests(self._ids)
        tokenizer = self.served.tokenizers[call.model]
        outputs = outputs_of(call, tokenizer)
        ids = tuple(r.id for r in requests)
        pending = _Pending(number, custom_id, prompt_text(body), call, ids, outputs)
        self._open |= {request_id: (pending, choice) for choice, request_id in enumerate(ids)}
        return requests

    def _answer_line(self, pending: _Pending) -> bytes:
        answer_id = _digest(pending.custom_id)
        created = int(self.now())
        tokenizer = self.served.tokenizers[pending.call.model]
        body = answer_body(pending.call, pending.outputs, tokenizer, answer_id, created)
        return batch_line(pending.custom_id, answer_id, 200, body, None)

    def _complete(self, pending: _Pending, line: bytes) -> None:
        self.write(line)
        self.counts.completed += 1
        text = pending.outputs[0].text
        self.on_answer(Answered(pending.number, pending.custom_id, pending.prompt, text, None))

    def _fail(self, number: int, custom_id: str | None, bad: BadRequest) -> None:
        # In the response, as OpenAI's format has it, and beside it, where many programs look first.
        error = {**bad.error, "message": f"line {number}: {bad.message}"}
        answer_id = _digest(f"{number}/{custom_id}")
        write = self.write_failure or self.write
        write(batch_line(custom_id, answer_id, bad.status, {"error": error}, error))
        self.counts.fail(bad.error["code"] or "invalid_request", error["message"])
        self.on_answer(Answered(number, custom_id, "", "", error["message"]))


def batch_line(
    custom_id: str | None, answer_id: str, status: int, body: Json, error: Json | None
) -> bytes:
    """Return one line of the output, in OpenAI's format."""
    line = {
        "id": f"batch_req_{answer_id}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{answer_id}", "body": body},
        "error": error,
    }
    text = json.dumps(line, ensure_ascii=False, allow_nan=False).translate(ESCAPED_LINE_ENDS)
    # A lone surrogate in a custom_id is written as the JSON escape that the input had.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _internal_error(custom_id: str | None, error: Exception) -> BadRequest:
    """Log an internal error, and return it as the error of the request that it affects."""
    log.exception("request %r failed", custom_id, exc_info=error)
    return BadRequest(
        f"an internal error ({type(error).__name__}: {error})", code="internal_error", status=500
    )


def parse_line(line: Line) -> Json:
    """Return the JSON object of an input line. Raises BadRequest."""
    if line.data is None:
        raise BadRequest("the line is too long", code="invalid_json")
    try:
        entry = json.loads(line.data.decode("utf-8-sig" if line.number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"not UTF-8 text ({error.reason})", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not valid JSON ({error})", code="invalid_json") from error
    if not isinstance(entry, dict):
        raise BadRequest("not a JSON object", code="invalid_json")
    return entry


def _custom_id(entry: Json) -> str:
    custom_id = entry.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BadRequest("custom_id is missing, or is not a string", "custom_id")
    return custom_id


def _url_and_body(entry: Json) -> tuple[str, Json]:
    if entry.get("method", "POST") != "POST":
        raise BadRequest(f"method must be POST, not {entry['method']!r}", "method")
    url, body = entry.get("url"), entry.get("body")
    if url not in (COMPLETIONS, CHAT):
        raise BadRequest(f"url must be {COMPLETIONS} or {CHAT}, not {url!r}", "url")
    if not isinstance(body, dict):
        raise BadRequest("body is missing, or is not an object", "body")
    return url, body


def prompt_text(body: Json) -> str:
    """Return the last message, or the prompt, to display."""
    messages = body.get("messages")
    prompt = messages[-1].get("content") if messages else body["prompt"]
    first = prompt[0] if isinstance(prompt, list) and prompt else prompt
    text = first.get("text") if isinstance(first, dict) else first
    return text if isinstance(text, str) else "(token ids)"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]
