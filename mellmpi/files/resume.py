"""Finds the requests that a batch output file already answers, so that a restart skips them.

Failed lines are removed by rewriting the file in place, so that links, owner and permissions stay.
The lines to keep are first written to a second file in the same directory: an interrupted rewrite
is repeated from there.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mellmpi.files.visible import visible

BEGINNING = b'{"id": "batch_req_'  # of every answer


def finished_ids(descriptor: int, path: str) -> frozenset[str]:
    """Return the custom_ids of the successful answers, and prepare the file for more answers.

    Removes an incomplete last line, and lines that report an error: their requests run again.
    descriptor  open to read and append
    path        its real path, without links
    ValueError  the file is not a batch output; it is not changed
    OSError     the file or its directory cannot be written; no answer is lost
    """
    _repair(descriptor, path)
    finished, complete_bytes, has_failures, line = set(), 0, False, b"\n"
    for position, line in _lines(descriptor, path):
        result = _result(line)
        if result is None:
            line = b"\n"
            break  # an incomplete last line
        if _succeeded(result):
            finished.add(result["custom_id"])
        else:
            has_failures = True
        complete_bytes = position + len(line)
    if has_failures:
        _keep_successes(descriptor, path)
    elif complete_bytes < os.fstat(descriptor).st_size:
        os.ftruncate(descriptor, complete_bytes)
    if not has_failures and not line.endswith(b"\n"):
        os.write(descriptor, b"\n")
    return frozenset(finished)


def _lines(descriptor: int, path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line). Raises ValueError for a line that is not a result, unless it may be an
    incomplete last line."""
    position = 0
    with open(descriptor, "rb", closefd=False) as stream:
        stream.seek(0)
        for number, line in enumerate(stream, start=1):
            if line.strip():
                if _result(line) is None and not _is_incomplete(line, is_first=number == 1):
                    raise ValueError(
                        f"{visible(path)} exists and is not a batch output (line {number} is not a "
                        "result); remove it, or give another name with -o"
                    )
                yield position, line
            position += len(line)


def _is_incomplete(line: bytes, is_first: bool) -> bool:
    """Return whether the line can be the beginning of an answer, cut when the job was killed."""
    if line.endswith(b"\n"):
        return False
    return not is_first or line.startswith(BEGINNING) or BEGINNING.startswith(line)


def _result(line: bytes) -> dict[str, Any] | None:
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_result = isinstance(result, dict) and {"custom_id", "response"} <= result.keys()
    return result if is_result else None


def _succeeded(result: dict[str, Any]) -> bool:
    response = result["response"]
    return (
        isinstance(response, dict)
        and response.get("status_code") == 200
        and isinstance(result["custom_id"], str)
    )


# --- the rewrite ---------------------------------------------------------------------------------


def kept_path(descriptor: int, path: str) -> Path:
    """Return the file for the lines to keep. It is named by inode: a new file has another."""
    return Path(path).with_name(f".mellmpi-{os.fstat(descriptor).st_ino}.jsonl")


def _keep_successes(descriptor: int, path: str) -> None:
    kept = _write_kept(descriptor, path)
    _copy(kept, descriptor)
    kept.unlink()


def _write_kept(descriptor: int, path: str) -> Path:
    """Write the lines to keep to `kept_path`, atomically, and return it."""
    kept = kept_path(descriptor, path)
    part = kept.with_suffix(".part")
    try:
        with open(part, "wb", opener=_private) as stream:
            for _, line in _lines(descriptor, path):
                result = _result(line)
                if result is not None and _succeeded(result):
                    stream.write(line.rstrip(b"\n") + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, kept)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise
    return kept


def _private(name: str, flags: int) -> int:
    """Open for the owner only: answers may be secret."""
    return os.open(name, flags, 0o600)


def _copy(kept: Path, descriptor: int) -> None:
    """Overwrite the file with `kept`. Until the end the file is at least as long as `kept`."""
    mode = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, mode & ~os.O_APPEND)  # to write at the beginning
    try:
        with kept.open("rb") as source, open(descriptor, "wb", closefd=False) as stream:
            stream.seek(0)
            shutil.copyfileobj(source, stream)
            stream.truncate()
        os.fsync(descriptor)
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, mode)


def _repair(descriptor: int, path: str) -> None:
    """Repeat an interrupted rewrite. A file shorter than the kept lines is another file."""
    kept = kept_path(descriptor, path)
    if not kept.exists():
        return
    if kept.stat().st_size <= os.fstat(descriptor).st_size:
        _copy(kept, descriptor)
    kept.unlink()
