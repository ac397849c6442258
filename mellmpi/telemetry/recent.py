"""Figures of the last seconds and running totals, for people who watch the job while it runs.

Terms as in `Metrics`, which covers the whole run instead.
"""

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from mellmpi import protocol as p
from mellmpi.telemetry.activity import Activity

RATE_S = 10.0  # span of rates
LATENCY_S = 60.0  # span of TTFT and TPOT
NEWEST = 2_048  # most samples of a latency, so that percentiles stay cheap
STEPS_S = 5.0  # span of a worker's figures
BIN_S = 0.5  # resolution of sums
MOVES = 50  # newest migrations that are kept


class Sums:
    """Sums over the last `span_s` seconds, in bins of BIN_S."""

    def __init__(self, span_s: float, size: int = 1):
        self._span_s, self._size = span_s, size
        self._bins: deque[tuple[int, list[float]]] = deque()
        self._first: float | None = None  # time of the first value

    def add(self, now: float, *values: float) -> None:
        """Add one value to each sum."""
        bin = int(now / BIN_S)
        if not self._bins or self._bins[-1][0] != bin:
            self._first = now if self._first is None else self._first
            self._bins.append((bin, [0.0] * self._size))
            self._forget(now)
        sums = self._bins[-1][1]
        for i, value in enumerate(values):
            sums[i] += value

    def _forget(self, now: float) -> None:
        while self._bins and (self._bins[0][0] + 1) * BIN_S <= now - self._span_s:
            self._bins.popleft()

    def totals(self, now: float) -> list[float]:
        """The sums up to `now`."""
        self._forget(now)
        return [sum(sums[i] for _, sums in self._bins) for i in range(self._size)]

    def rates(self, now: float) -> list[float]:
        """The sums a second; over the time since the first value, if that is shorter."""
        seen_s = 0.0 if self._first is None else now - self._first
        return [total / min(max(seen_s, BIN_S), self._span_s) for total in self.totals(now)]


class Latency:
    """The newest samples of the last LATENCY_S seconds, at most NEWEST."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=NEWEST)

    def add(self, now: float, seconds: float) -> None:
        self._samples.append((now, seconds))

    def percentiles_ms(self, now: float) -> dict[str, float | None]:
        """{"p50", "p99"} in milliseconds; None without samples."""
        while self._samples and self._samples[0][0] <= now - LATENCY_S:
            self._samples.popleft()
        if not self._samples:
            return {"p50": None, "p99": None}
        p50, p99 = np.percentile([seconds for _, seconds in self._samples], (50, 99)) * 1e3
        return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


@dataclass(frozen=True, slots=True)
class Move:
    """A migration that has ended; times in seconds."""

    ended_s: float
    seconds: float  # from its decision until rank 0 learned of its end
    started: p.MigrationStarted
    ended: p.MigrationEnded


@dataclass(slots=True)
class _Open:
    """A request between Submit and its end."""

    submit_s: float
    num_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0


class Recent:
    """Observes what `Metrics` observes, with the same calls."""

    def __init__(self) -> None:
        self.ttft, self.tpot = Latency(), Latency()
        self.moves: deque[Move] = deque(maxlen=MOVES)
        self._output, self._requests = Sums(RATE_S), Sums(RATE_S)
        self._steps: dict[int, Sums] = {}  # by worker: steps, their seconds, output tokens
        self._count: Counter[str] = Counter()
        self._open: dict[int, _Open] = {}
        self._migrating: dict[int, tuple[float, p.MigrationStarted]] = {}
        self._activity = Activity()
        self._start_s: float | None = None  # time of the first Submit

    # --- input ---

    def observe(self, now: float, source: p.Address, event: Any) -> None:
        """Rank 0 has received `event` from `source`, and is about to handle it."""
        match event:
            case p.StepReport() if isinstance(source, int):
                if (sums := self._steps.get(source)) is None:
                    sums = self._steps[source] = Sums(STEPS_S, size=3)
                sums.add(now, event.steps, event.step_s, len(event.tokens))
            case p.Submit():
                self._submitted(now, event.request.id)
            case p.Cancel(request_id, reason):
                self._ended(now, request_id, completed=reason == "stop")
            case p.WorkerReady() if isinstance(source, int):
                self._activity.ready(now, source, event)
            case p.Parked() if isinstance(source, int):
                self._activity.enter(now, source, "parked")
            case p.WorkerLost():
                self._activity.enter(now, event.worker, "lost")

    def commands(self, now: float, commands: list[tuple[p.Address, Any]]) -> None:
        """Rank 0 sends these commands in response to the event observed last."""
        num_tokens = 0
        for _, command in commands:
            if isinstance(command, p.Emit):  # the most frequent by far
                num_tokens += len(command.tokens)
                self._emitted(now, command)
            else:
                self._observed(now, command)
        if num_tokens:
            self._count["output_tokens"] += num_tokens
            self._output.add(now, num_tokens)

    def _observed(self, now: float, command: Any) -> None:
        match command:
            case p.Rejected():
                self._ended(now, command.request_id, completed=False)
            case p.WorkerChanged():
                self._activity.enter(now, command.worker, command.state)
            case p.MigrationStarted():
                self._migrating[command.request_id] = (now, command)
            case p.MigrationEnded():
                self._moved(now, command)

    def _submitted(self, now: float, request_id: int) -> None:
        if self._start_s is None:
            self._start_s = now
            self._activity.begin(now)
        self._open[request_id] = _Open(now)
        self._count["requests"] += 1
        self._requests.add(now, 1)

    def _emitted(self, now: float, emit: p.Emit) -> None:
        request = self._open.get(emit.request_id)
        if request is None:
            return
        if emit.tokens:
            if not request.num_tokens:
                request.first_s = now
                self.ttft.add(now, now - request.submit_s)
            request.last_s = now
            request.num_tokens += len(emit.tokens)
        if emit.finish_reason is not None:
            self._ended(now, emit.request_id, completed=True)

    def _ended(self, now: float, request_id: int, completed: bool) -> None:
        self._migrating.pop(request_id, None)
        request = self._open.pop(request_id, None)
        if request is not None and completed and request.num_tokens > 1:
            self.tpot.add(now, (request.last_s - request.first_s) / (request.num_tokens - 1))

    def _moved(self, now: float, ended: p.MigrationEnded) -> None:
        self._count["migrations"] += ended.outcome == "moved"
        if (found := self._migrating.pop(ended.request_id, None)) is not None:
            start_s, started = found
            self.moves.append(Move(now, now - start_s, started, ended))

    # --- output ---

    def worker(self, worker: int, now: float) -> tuple[float | None, float]:
        """(mean milliseconds of a step, output tokens a second); None without a step."""
        if (sums := self._steps.get(worker)) is None:
            return None, 0.0
        steps, step_s, _ = sums.totals(now)
        return step_s / steps * 1e3 if steps else None, sums.rates(now)[2]

    def rates(self, now: float) -> dict[str, float]:
        """Output tokens and submitted requests a second."""
        return {
            "output_tokens_per_s": self._output.rates(now)[0],
            "requests_per_s": self._requests.rates(now)[0],
        }

    def totals(self, now: float) -> dict[str, float]:
        """Counts since the start, and device seconds since the first Submit.

        gpu_seconds_all_on: what they would be if no worker parked.
        """
        counts = {name: self._count[name] for name in ("requests", "output_tokens", "migrations")}
        begun = self._start_s is not None
        active_s = self._activity.active_s(now) if begun else 0.0
        all_s = len(self._activity) * (now - (self._start_s or 0.0)) if begun else 0.0
        return {**counts, "gpu_seconds": active_s, "gpu_seconds_all_on": all_s}
