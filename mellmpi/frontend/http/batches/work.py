"""The blocking part of a batch: its files, and the `BatchJob` between them. Runs in a thread."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mellmpi.config import UsageError
from mellmpi.files import (
    Destination,
    Source,
    Unwritable,
    descriptor_reader,
    open_input,
    requests_in,
)
from mellmpi.frontend.batch import BatchJob
from mellmpi.frontend.http.batches.store import BatchRecord, FileRecord, Store, record_of
from mellmpi.frontend.openai import Call
from mellmpi.frontend.served import ServedModels
from mellmpi.protocol import Cancel, Emit, Rejected, Request

MOST_REQUESTS = 50_000  # of a batch, as at OpenAI
MOST_DRAWN = 16  # requests tokenized in one round, so that answers do not wait for long
SAVE_EVERY_S = 1.0  # the counts, for clients that ask


class Failed(Exception):
    """A batch as a whole cannot be answered."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.entry = {"code": code, "message": message, "param": None, "line": None}


class Upload(Source):
    """The name of an input for messages."""

    def __str__(self) -> str:
        return f"the file {self.name}"

    def conversion_hint(self, command: str) -> str:
        return f"convert it with  {command}"


@dataclass(frozen=True)
class Round:
    """What is to be done after a round. The ids are those of the `BatchJob`."""

    cancels: list[Cancel]
    requests: list[Request]
    is_done: bool
    stop: str  # "cancelled" or "expired": answer no more lines; "": go on


class Work:
    """A batch between its lock and its end."""

    def __init__(
        self,
        store: Store,
        record: BatchRecord,
        served: ServedModels,
        parse_call: Callable[..., Call],
    ):
        self.record = record
        self._store, self._served, self._parse_call = store, served, parse_call
        paths = [str(store.contents(i)) for i in (record.answers_id, record.failures_id)]
        self._answers = Destination("output file", record.answers_id, paths[0], os.O_RDWR)
        self._failures = Destination("error file", record.failures_id, paths[1])
        self._input: int | None = None
        self._job: BatchJob | None = None
        self._saved_s = 0.0

    def begin(self) -> None:
        """Check the input, and open the outputs behind earlier answers. Raises Failed.

        Lines that failed in an earlier run are tried again, as `run-batch` does.
        """
        path = self._store.contents(self.record.input_file_id)
        if not path.exists():
            raise Failed("file_not_found", "the input file has been deleted")
        source = Upload(self.record.input_file_id)
        try:
            self._input = open_input(str(path), source)
            requests = requests_in(self._input, descriptor_reader(self._input), source)
            if not requests.count:
                raise Failed("empty_file", f"{source} has no requests")
            if requests.count > MOST_REQUESTS:
                raise Failed("too_many_requests", f"{source} has over {MOST_REQUESTS} requests")
            finished = self._answers.resume()
            self._failures.begin()
        except (UsageError, Unwritable) as error:
            raise Failed("invalid_file", str(error)) from error
        self._job = BatchJob(
            requests.lines,
            self._answers.append,
            self._served,
            finished,
            parse_call=self._parse_call,
            write_failure=self._failures.append,
        )
        total = requests.count
        self._save(self.record.at("in_progress", time.time(), total=total))

    def round(self, events: Sequence[Emit | Rejected], room: int) -> Round:
        """Take events, and draw as many requests. Raises Unwritable, OSError or Failed.

        An incomplete answer is in no file: a batch can be left at any time.
        """
        job, cancels = self._job, []
        assert job is not None
        for event in events:
            if isinstance(event, Emit):
                cancels += [Cancel(i, "stop") for i in job.emit(event)]
            else:
                cancels += [Cancel(i, "gone") for i in job.rejected(event)]
        requests: list[Request] = []
        while len(requests) < min(room, MOST_DRAWN):
            if (request := next(job.requests(), None)) is None:
                break
            requests.append(request)
        if job.done and job.lines.problem:
            raise Failed("invalid_file", job.lines.problem)
        if time.monotonic() >= self._saved_s + SAVE_EVERY_S:
            self._save(self._counted())
        return Round(cancels, requests, job.done, self._reason_to_stop())

    def _reason_to_stop(self) -> str:
        if self._store.cancelled_s(self.record.id) is not None:
            return "cancelled"
        return "expired" if time.time() > self.record.expires_at else ""

    def end(self, status: str, errors: tuple[dict[str, Any], ...]) -> None:
        """Let clients see the outputs, and record the end. Raises Unwritable or OSError; then it
        can be called again."""
        record = self._counted()
        if (since := self._store.cancelled_s(record.id)) is not None:
            record = record.at("cancelling", since)
        if status != "failed":
            self._save(record := record.at("finalizing", time.time()))
            self._answers.flush()
            self._failures.flush()
        has_answers = self._publish(record.answers_id, "output")
        has_failures = self._publish(record.failures_id, "errors")
        given = {"has_answers": has_answers, "has_failures": has_failures, "errors": errors}
        self._save(record.at(status, time.time(), **given))

    def _publish(self, file_id: str, kind: str) -> bool:
        """Let clients see an output unless it is empty. Returns whether they can."""
        path, record = self._store.contents(file_id), self.record
        num_bytes = path.stat().st_size if path.exists() else 0
        if not num_bytes:
            self._store.delete(file_id)
            return False
        file = record_of(
            FileRecord,
            id=file_id,
            owner=record.owner,
            filename=f"{record.id}_{kind}.jsonl",
            purpose="batch_output",
            num_bytes=num_bytes,
        )
        self._store.publish(file)
        return True

    def close(self) -> None:
        """Close the files."""
        for descriptor in (self._input, self._answers.descriptor, self._failures.descriptor):
            if descriptor is not None:
                os.close(descriptor)

    def _counted(self) -> BatchRecord:
        if self._job is None:
            return self.record
        counts = self._job.counts
        completed = counts.completed + counts.skipped
        return replace(self.record, completed=completed, failed=counts.failed)

    def _save(self, record: BatchRecord) -> None:
        self._saved_s = time.monotonic()
        if record != self.record:
            self._store.save(record)
            self.record = record
