"""Replays a trace as a batch job: its arrival times and lengths, with random prompt tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mellmpi.frontend.batch import Answered, Counts, batch_line
from mellmpi.frontend.served import ServedModel
from mellmpi.protocol import GREEDY, Emit, Rejected, Request
from mellmpi.workload import Workload

SHOWN_REJECTIONS = 3  # a trace may have thousands
TOO_LONG = "too_long"


@dataclass(slots=True)
class _Pending:
    request: Request
    tokens: list[int] = field(default_factory=list)


@dataclass
class ReplayJob:
    """The counterpart of `BatchJob` for a trace. A `RequestSource`; needs no tokenizer.

    A single model serves all requests, whatever model the trace names. With several models, the
    trace names the model of each request, by default the first. Raises ValueError if no model has
    the name.

    A prompt depends only on the seed and the request's row in the trace. Its answer has exactly the
    length that the trace gives. Requests that no worker can hold fail, and are counted.
    """

    workload: Workload
    models: tuple[ServedModel, ...]
    seed: int
    write: Callable[[bytes], Any] | None = None  # None: answers are only counted
    on_answer: Callable[[Answered], None] = lambda _: None
    counts: Counts = field(default_factory=Counts)
    _next: int = 0  # of `_rows`
    _open: dict[int, _Pending] = field(default_factory=dict)
    _failed_too_long: bool = False  # requests that are too long have been failed

    def __post_init__(self) -> None:
        total = self.workload.prompt_tokens + self.workload.output_tokens
        limits = np.array([self._model(row).max_model_len for row in range(len(total))], np.int64)
        self._rows = np.flatnonzero(total <= limits)

    def _model(self, row: int) -> ServedModel:
        """Return the model of this row of the trace. Raises ValueError."""
        name = self.workload.model[row]
        if len(self.models) == 1 or not name:
            return self.models[0]
        if (found := next((m for m in self.models if m.name == name), None)) is None:
            raise ValueError(
                f"--replay: the trace names the model {name}; give one --model the "
                f"--served-model-name {name}"
            )
        return found

    @property
    def exhausted(self) -> bool:
        """Whether every request has been yielded."""
        return self._failed_too_long and self._next == len(self._rows)

    @property
    def done(self) -> bool:
        """Whether every request has ended."""
        return self.exhausted and not self._open

    def arrivals(self) -> Iterator[float]:
        """Yield the arrival times of the requests in seconds after the first row, then 0.0 forever:
        callers ask for one time more than there are requests."""
        times = self.workload.arrival_s
        yield from (times[self._rows] - times[0]).tolist()
        while True:
            yield 0.0

    def requests(self) -> Iterator[Request]:
        """Yield requests to submit, in the order of arrival."""
        if not self._failed_too_long:
            self._fail_too_long()
        while self._next < len(self._rows):
            request = self._request(int(self._rows[self._next]))
            self._next += 1
            self._open[request.id] = _Pending(request)
            yield request

    def emit(self, event: Emit) -> tuple[int, ...]:
        """Take new tokens. Returns no ids to cancel: answers end at their length only."""
        row = self._open[event.request_id]
        if self.write is not None:
            row.tokens += event.tokens
        if event.finish_reason is not None:
            del self._open[event.request_id]
            self._complete(row)
        return ()

    def rejected(self, event: Rejected) -> tuple[int, ...]:
        """Fail a request that no worker can serve. Returns no ids to cancel."""
        del self._open[event.request_id]
        self._fail(event.request_id, "rejected", event.reason)
        if self.counts.reasons["rejected"] <= SHOWN_REJECTIONS:
            self._show(event.request_id, event.reason)
        return ()

    # --- one row of the trace -------------------------------------------------------------------

    def _request(self, row: int) -> Request:
        rng = np.random.default_rng((self.seed, row))
        length = int(self.workload.prompt_tokens[row])
        model = self._model(row)
        prompt = tuple(rng.integers(0, model.vocab_size, length).tolist())
        sampling = replace(GREEDY, max_tokens=int(self.workload.output_tokens[row]), seed=row)
        return Request(row + 1, model.name, prompt, sampling, None, 0, None)

    def _complete(self, row: _Pending) -> None:
        self.counts.completed += 1
        if self.write is not None:
            name, prompt = _name(row.request.id), len(row.request.prompt)
            choice = {"index": 0, "text": "", "token_ids": row.tokens, "finish_reason": "length"}
            usage = {
                "prompt_tokens": prompt,
                "completion_tokens": len(row.tokens),
                "total_tokens": prompt + len(row.tokens),
            }
            body = {
                "id": f"cmpl-{name}",
                "object": "text_completion",
                "model": row.request.model,
                "choices": [choice],
                "usage": usage,
            }
            self.write(batch_line(name, name, 200, body, None))

    def _fail_too_long(self) -> None:
        self._failed_too_long = True
        failed = np.setdiff1d(np.arange(len(self.workload)), self._rows).tolist()
        longest = max(model.max_model_len for model in self.models)
        why = f"longer than {longest} tokens, prompt and output together"
        for row in failed:
            self._fail(row + 1, TOO_LONG, why)
        if failed:
            limit = "which is the limit of the model or of a worker's KV cache"
            hint = "--length-scale makes requests shorter"
            self._show(
                failed[0] + 1,
                f"{len(failed)} of {len(self.workload)} requests are {why}, {limit}; {hint}",
            )

    def _fail(self, number: int, code: str, why: str) -> None:
        self.counts.fail(code, why)
        if self.write is not None:
            error = {"message": why, "type": "invalid_request_error", "param": None, "code": code}
            name = _name(number)
            self.write(batch_line(name, name, 400, {"error": error}, error))

    def _show(self, number: int, why: str) -> None:
        self.on_answer(Answered(number, _name(number), "", "", why))


def _name(number: int) -> str:
    return f"row-{number}"
