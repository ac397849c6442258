"""The directory of files and batches. All methods may wait for the disk.

files/ID.jsonl       contents of a file
files/ID.json        its record; a file without one is not there for clients
batches/ID.json      record of a batch; after its creation only the holder of the lock writes
batches/ID.lock      locked (flock) by the API server that runs the batch, until its end
batches/ID.cancel    exists once a client has cancelled the batch
"""

import contextlib
import fcntl
import functools
import json
import logging
import os
import re
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)
Json = dict[str, Any]
R = TypeVar("R", "FileRecord", "BatchRecord")
ID = re.compile("(file-|batch_)[0-9a-f]{32}")
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file of a client."""

    id: str
    owner: str  # name of the API key; empty: none was needed
    made_ns: int  # unix time
    filename: str
    purpose: str  # "batch" or "batch_output"
    num_bytes: int

    def body(self) -> Json:
        """Return OpenAI's form."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.made_ns // 10**9,
            "expires_at": None,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """A batch of a client. Times are unix times in whole seconds."""

    id: str
    owner: str  # name of the API key; empty: none was needed
    made_ns: int  # unix time
    endpoint: str
    input_file_id: str
    completion_window: str
    expires_at: int
    metadata: dict[str, str] | None
    answers_id: str  # of the file of the answers, for clients once the batch has ended
    failures_id: str
    status: str = "validating"
    times: dict[str, int]  # status -> when it began
    total: int = 0  # requests in the input
    completed: int = 0
    failed: int = 0
    has_answers: bool = False  # clients may read `answers_id`
    has_failures: bool = False
    errors: tuple[Json, ...] = ()  # why the batch as a whole failed

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    def at(self, status: str, now: float, **changes: Any) -> "BatchRecord":
        """Return the record with another status."""
        return replace(self, status=status, times={status: int(now), **self.times}, **changes)

    def body(self) -> Json:
        """Return OpenAI's form."""
        errors = {"object": "list", "data": list(self.errors)} if self.errors else None
        counts = {"total": self.total, "completed": self.completed, "failed": self.failed}
        stages = ("in_progress", "finalizing", *ENDED, "cancelling")
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.answers_id if self.has_answers else None,
            "error_file_id": self.failures_id if self.has_failures else None,
            "created_at": self.made_ns // 10**9,
            "expires_at": self.expires_at,
            **{f"{stage}_at": self.times.get(stage) for stage in stages},
            "request_counts": counts,
            "metadata": self.metadata,
        }


def new_id(prefix: str) -> str:
    """Return a random id."""
    return prefix + uuid.uuid4().hex


class Store:
    """Records and contents below a directory."""

    def __init__(self, directory: Path):
        self._files, self._batches = directory / "files", directory / "batches"
        for folder in (self._files, self._batches):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    # --- files -----------------------------------------------------------------------------------

    def contents(self, file_id: str) -> Path:
        """Return the path of the contents of a file."""
        return self._files / f"{file_id}.jsonl"

    def publish(self, file: FileRecord) -> None:
        """Let clients see a file whose contents are complete."""
        _write(self._files / f"{file.id}.json", file)

    def file(self, file_id: str, owner: str) -> FileRecord | None:
        """Return the record of a file; None if this owner has none of this id."""
        return _owned(FileRecord, self._files, file_id, owner)

    def files(self, owner: str) -> list[FileRecord]:
        """Return the files of an owner, newest first."""
        return _all(FileRecord, self._files, owner)

    def delete(self, file_id: str) -> None:
        """Remove a file. A batch that reads the contents can read on."""
        (self._files / f"{file_id}.json").unlink(missing_ok=True)
        self.contents(file_id).unlink(missing_ok=True)

    # --- batches ---------------------------------------------------------------------------------

    def save(self, batch: BatchRecord) -> None:
        """Write the record of a batch."""
        _write(self._batches / f"{batch.id}.json", batch)

    def batch(self, batch_id: str, owner: str) -> BatchRecord | None:
        """Return the record of a batch; None if this owner has none of this id."""
        found = _owned(BatchRecord, self._batches, batch_id, owner)
        return found and self._seen(found)

    def batches(self, owner: str) -> list[BatchRecord]:
        """Return the batches of an owner, newest first."""
        return list(map(self._seen, _all(BatchRecord, self._batches, owner)))

    def _seen(self, batch: BatchRecord) -> BatchRecord:
        """Return the record as clients see it: a cancelled batch may still be running."""
        if batch.has_ended or (since := self.cancelled_s(batch.id)) is None:
            return batch
        return batch.at("cancelling", since)

    def cancel(self, batch: BatchRecord) -> None:
        """Tell the API server that runs a batch to end it."""
        (self._batches / f"{batch.id}.cancel").touch(mode=0o600)

    def cancelled_s(self, batch_id: str) -> float | None:
        """Return when a client has cancelled a batch, as unix time."""
        try:
            return (self._batches / f"{batch_id}.cancel").stat().st_mtime
        except FileNotFoundError:
            return None

    def unfinished(self, ended: set[str]) -> list[BatchRecord]:
        """Return the batches that have not ended, oldest first. Adds the others to `ended`."""
        found = []
        for path in self._batches.glob("batch_*.json"):
            if path.stem not in ended and (batch := _read(BatchRecord, path)) is not None:
                if batch.has_ended:
                    ended.add(batch.id)
                else:
                    found.append(batch)
        return sorted(found, key=lambda batch: batch.made_ns)

    def lock(self, batch_id: str) -> tuple[int, BatchRecord] | None:
        """Return a descriptor that holds the lock of a batch until it is closed, and the record.

        None: another process holds the lock, or the batch has ended.
        """
        path = self._batches / f"{batch_id}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            batch = _read(BatchRecord, self._batches / f"{batch_id}.json")
            if batch is not None and not batch.has_ended:
                return descriptor, batch
        os.close(descriptor)
        return None


def record_of(batch_or_file: type[R], **fields: Any) -> R:
    """Return a new record, made now."""
    return batch_or_file(made_ns=time.time_ns(), **fields)


def _owned(kind: type[R], folder: Path, record_id: str, owner: str) -> R | None:
    if not ID.fullmatch(record_id):  # never a path
        return None
    record = _read(kind, folder / f"{record_id}.json")
    return record if record is not None and record.owner == owner else None


def _all(kind: type[R], folder: Path, owner: str) -> list[R]:
    records = (_read(kind, path) for path in folder.glob("*.json"))
    mine = [record for record in records if record is not None and record.owner == owner]
    return sorted(mine, key=lambda record: record.made_ns, reverse=True)


def _read(kind: type[R], path: Path) -> R | None:
    """Return a record; None if there is none, or if it is not one of this version."""
    try:
        fields: Json = json.loads(path.read_bytes())
        if "errors" in fields:
            fields["errors"] = tuple(fields["errors"])
        return kind(**fields)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        _warn(path, str(error))
        return None


@functools.cache  # once
def _warn(path: Path, problem: str) -> None:
    log.error("%s is not a record of this version: %s", path, problem)


def _write(path: Path, record: FileRecord | BatchRecord) -> None:
    """Replace a record, atomically: after a loss of power there is the old one or the new one."""
    part = path.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb", opener=private) as stream:
            stream.write(json.dumps(asdict(record)).encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def private(name: str, flags: int) -> int:
    """Open for the owner only."""
    return os.open(name, flags, 0o600)
