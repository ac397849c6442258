"""A run as a stream of trace events, for ui.perfetto.dev and chrome://tracing.

A process of the trace is a worker, with its steps, its KV in use, its states, the requests that it
owns and their migrations; process 0 is rank 0, with all requests and its queue. Format: JSON array
of the "Trace Event Format" (Google, 2016), which may be read before its end is written.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mellmpi import protocol as p

RANK_0 = 0  # process of the trace; a worker's process is its number
STEPS, ARROWS = 0, 1  # threads of a worker
FLUSH_AT = 1 << 16  # characters kept before they are written
ARROW_US = 1.0  # an arrow begins and ends at a slice; so short are those made for it


@dataclass(slots=True)
class _Worker:
    capacity_bytes: int = 0
    stepped_us: float = 0.0  # end of its last slice
    used_bytes: int | None = None  # as written last
    state: str = ""


class Trace:
    """Observes what `Metrics` does; memory is that of live requests and a small buffer."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        """`write` takes parts of the file, in order."""
        self._write, self._text, self._length = write, ["[\n"], 0
        self._start_s: float | None = None
        self._workers: dict[int, _Worker] = {}
        self._owner: dict[int, int] = {}  # live request -> worker, or RANK_0
        self._silent: set[int] = set()  # live requests without a token
        self._open: dict[tuple[int, str, str], str] = {}  # (process, category, id) -> name
        self._moves: dict[int, tuple[int, float, str]] = {}  # request -> (number, start, name)
        self._num_moves = 0
        self._name(RANK_0, "rank 0: requests")

    # --- input ---

    def observe(self, now: float, source: p.Address, event: Any) -> None:
        """Rank 0 has received `event` from `source`."""
        us = self._us(now)
        match event:
            case p.StepReport() if isinstance(source, int):
                self._stepped(us, source, event)
            case p.Submit(request):
                self._submitted(us, request)
            case p.Cancel(request_id, reason):
                self._ended(us, request_id, {"cancelled": reason})
            case p.WorkerReady() if isinstance(source, int):
                self._worker(source).capacity_bytes = event.capacity_bytes
                self._used(us, source, event.capacity_bytes)
            case p.WorkerLost(worker):
                for request_id in [r for r, w in self._owner.items() if w == worker]:
                    self._own(us, request_id, RANK_0)
                self._enter(us, worker, "lost")

    def commands(self, now: float, commands: list[tuple[p.Address, Any]]) -> None:
        """Rank 0 sends these commands in response to the event observed last."""
        us = self._us(now)
        for destination, command in commands:
            match command:
                case p.Emit():
                    self._emitted(us, command)
                case p.Assign() if isinstance(destination, int):
                    self._own(us, command.request.id, destination)
                case p.Rejected():
                    self._ended(us, command.request_id, {"rejected": command.reason})
                case p.Preempted():
                    self._own(us, command.request_id, RANK_0)
                case p.MigrationStarted():
                    self._move_started(us, command)
                case p.MigrationEnded():
                    self._move_ended(us, command)
                case p.WorkerChanged():
                    self._enter(us, command.worker, command.state)

    def close(self, now: float) -> None:
        """End all slices and the file. Nothing may be observed afterwards."""
        us = self._us(now)
        for process, category, id in list(self._open):
            self._end(us, process, category, id, {})
        self._add({"ph": "M", "name": "trace_end", "pid": RANK_0, "args": {}}, end="\n]\n")
        self._flush()

    # --- workers ---

    def _worker(self, worker: int) -> _Worker:
        if (known := self._workers.get(worker)) is None:
            known = self._workers[worker] = _Worker()
            self._name(worker, f"worker {worker}")
            for thread, name in ((STEPS, "steps"), (ARROWS, "moves")):
                data = {"ph": "M", "name": "thread_name", "pid": worker, "tid": thread}
                self._add({**data, "args": {"name": name}})
        return known

    def _name(self, process: int, name: str) -> None:
        self._add({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        args = {"sort_index": process}
        self._add({"ph": "M", "name": "process_sort_index", "pid": process, "args": args})

    def _stepped(self, us: float, worker: int, report: p.StepReport) -> None:
        """A slice up to now. Slices of one worker do not overlap, though reports may be late."""
        known = self._worker(worker)
        if report.steps:
            start = max(known.stepped_us, us - report.step_s * 1e6)
            known.stepped_us = us
            self._line(
                f'{{"ph":"X","name":"{report.steps} steps","pid":{worker},"tid":{STEPS},'
                f'"ts":{start:.1f},"dur":{us - start:.1f},"args":{{"prefill_tokens":'
                f'{report.prefill_tokens},"decode_tokens":{report.decode_tokens}}}}}'
            )
        self._used(us, worker, report.free_bytes)

    def _used(self, us: float, worker: int, free_bytes: int) -> None:
        known = self._worker(worker)
        used = max(0, known.capacity_bytes - free_bytes)
        if used != known.used_bytes:
            known.used_bytes = used
            self._line(
                f'{{"ph":"C","name":"KV bytes in use","pid":{worker},"ts":{us:.1f},'
                f'"args":{{"used":{used}}}}}'
            )

    def _enter(self, us: float, worker: int, state: str) -> None:
        known = self._worker(worker)
        if known.state == state:
            return
        self._end(us, worker, "state", "state", {})
        known.state = state
        self._begin(us, worker, "state", "state", state, {})

    # --- requests ---

    def _submitted(self, us: float, request: p.Request) -> None:
        id, args = str(request.id), {"model": request.model, "prompt_tokens": len(request.prompt)}
        self._begin(us, RANK_0, "request", id, f"request {id}", args)
        self._begin(us, RANK_0, "place", id, "queued", {})
        self._owner[request.id] = RANK_0
        self._silent.add(request.id)

    def _own(self, us: float, request_id: int, worker: int) -> None:
        owner, id = self._owner.get(request_id), str(request_id)
        if owner is None or owner == worker:
            return
        self._end(us, owner, "place", id, {})
        self._owner[request_id] = worker
        name = "queued" if worker == RANK_0 else f"request {id}"
        self._begin(us, worker, "place", id, name, {})

    def _emitted(self, us: float, emit: p.Emit) -> None:
        if emit.request_id in self._silent and emit.tokens:
            self._silent.discard(emit.request_id)
            id = str(emit.request_id)
            self._async("n", us, RANK_0, "request", id, "first token", {})
        if emit.finish_reason is not None:
            args = {"finish_reason": emit.finish_reason}
            self._ended(us, emit.request_id, {**args, "tokens": emit.first + len(emit.tokens)})

    def _ended(self, us: float, request_id: int, args: dict[str, Any]) -> None:
        if (owner := self._owner.pop(request_id, None)) is not None:
            self._silent.discard(request_id)
            self._end(us, owner, "place", str(request_id), {})
            self._end(us, RANK_0, "request", str(request_id), args)

    # --- migrations ---

    def _move_started(self, us: float, started: p.MigrationStarted) -> None:
        name = f"{started.mode} {started.src} → {started.dst}, request {started.request_id}"
        self._num_moves += 1
        self._moves[started.request_id] = self._num_moves, us, name
        args = {
            "reason": started.reason,
            "predicted_s": started.predicted_s,
            "predicted_downtime_s": started.predicted_downtime_s,
            "predicted_bytes": started.num_bytes,
        }
        for worker in (started.src, started.dst):
            self._worker(worker)
            self._begin(us, worker, "migration", str(self._num_moves), name, args)

    def _move_ended(self, us: float, ended: p.MigrationEnded) -> None:
        if (known := self._moves.pop(ended.request_id, None)) is None:
            return
        number, start_us, name = known
        args = {"outcome": ended.outcome, "bytes": ended.num_bytes, "transfer_s": ended.transfer_s}
        for worker in (ended.src, ended.dst):
            self._end(us, worker, "migration", str(number), args)
        if ended.outcome == "moved":
            self._arrow("s", start_us, ended.src, number, name)
            self._arrow("f", us, ended.dst, number, name)
            self._own(us, ended.request_id, ended.dst)

    def _arrow(self, phase: str, us: float, worker: int, number: int, name: str) -> None:
        """One end of an arrow, and the slice that it is bound to."""
        at = {"name": name, "cat": "migration", "pid": worker, "tid": ARROWS, "ts": round(us, 1)}
        self._add({"ph": "X", **at, "dur": ARROW_US})
        self._add({"ph": phase, **at, "id": number, "bp": "e"})

    # --- output ---

    def _begin(
        self, us: float, process: int, category: str, id: str, name: str, args: dict[str, Any]
    ) -> None:
        """Begin a slice; until it ends, (process, category, id) belongs to it."""
        self._open[process, category, id] = name
        self._async("b", us, process, category, id, name, args)

    def _end(self, us: float, process: int, category: str, id: str, args: dict[str, Any]) -> None:
        if (name := self._open.pop((process, category, id), None)) is not None:
            self._async("e", us, process, category, id, name, args)

    def _async(
        self,
        phase: str,
        us: float,
        process: int,
        category: str,
        id: str,
        name: str,
        args: dict[str, Any],
    ) -> None:
        at = {"pid": process, "tid": 0, "ts": round(us, 1), "args": args}
        self._add({"ph": phase, "cat": category, "id2": {"local": id}, "name": name, **at})

    def _us(self, now: float) -> float:
        """Microseconds since the first event."""
        if self._start_s is None:
            self._start_s = now
        return (now - self._start_s) * 1e6

    def _add(self, event: dict[str, Any], end: str = ",\n") -> None:
        self._line(json.dumps(event), end)

    def _line(self, text: str, end: str = ",\n") -> None:
        self._text += (text, end)
        self._length += len(text) + len(end)
        if self._length >= FLUSH_AT:
            self._flush()

    def _flush(self) -> None:
        self._write("".join(self._text).encode())
        self._text, self._length = [], 0
