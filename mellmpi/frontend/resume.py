"""What a batch output file already answers, so that a restart does only the rest.

Answers stay in the same file (its links, owner and permissions too), which is rewritten in place
where failed lines are taken out of it. What is kept is first written to a file beside it, so that
a rewrite that was interrupted at any moment is done again from there.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mellmpi.frontend.visible import visible

BEGINNING = b'{"id": "batch_req_'  # of every answer


def finished_ids(descriptor: int, path: str) -> frozenset[str]:
    """The custom_ids that the open file answers with success; the file is made ready for more.

    Takes out a torn last line, and lines that report an error: their requests run again.
    descriptor  open to read and append
    path        its real path, without links
    ValueError if the file is something else than a batch output; it is then left as it is.
    OSError if it cannot be changed, or nothing can be written beside it; no answer is lost.
    """
    _repair(descriptor, path)
    finished, whole_bytes, has_failures, line = set(), 0, False, b"\n"
    for position, line in _lines(descriptor, path):
        result = _result(line)
        if result is None:
            line = b"\n"
            break  # a torn last line
        if _succeeded(result):
            finished.add(result["custom_id"])
        else:
            has_failures = True
        whole_bytes = position + len(line)
    if has_failures:
        _keep_successes(descriptor, path)
    elif whole_bytes < os.fstat(descriptor).st_size:
        os.ftruncate(descriptor, whole_bytes)
    if not has_failures and not line.endswith(b"\n"):
        os.write(descriptor, b"\n")
    return frozenset(finished)


def _lines(descriptor: int, path: str) -> Iterator[tuple[int, bytes]]:
    """(offset, line); all but the last, which may be torn, are results or a ValueError."""
    position = 0
    with open(descriptor, "rb", closefd=False) as stream:
        stream.seek(0)
        for number, line in enumerate(stream, start=1):
            if line.strip():
                if _result(line) is None and not _is_torn(line, is_first=number == 1):
                    raise ValueError(
                        f"{visible(path)} exists and is no batch output (line {number} is not a "
                        "result); remove it, or give another name with -o"
                    )
                yield position, line
            position += len(line)


def _is_torn(line: bytes, is_first: bool) -> bool:
    """Can it be what was written of an answer when the job was killed?"""
    if line.endswith(b"\n"):
        return False
    return not is_first or line.startswith(BEGINNING) or BEGINNING.startswith(line)


def _result(line: bytes) -> dict[str, Any] | None:
    try:
        result = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(result, dict) and {"custom_id", "response"} <= result.keys()
    return result if good else None


def _succeeded(result: dict[str, Any]) -> bool:
    response = result["response"]
    return (
        isinstance(response, dict)
        and response.get("status_code") == 200
        and isinstance(result["custom_id"], str)
    )


# --- the rewrite ---------------------------------------------------------------------------------


def kept_path(descriptor: int, path: str) -> Path:
    """Where the lines to keep are written first; a new file of the same name has another."""
    return Path(path).with_name(f".mellmpi-{os.fstat(descriptor).st_ino}.jsonl")


def _keep_successes(descriptor: int, path: str) -> None:
    kept = _write_kept(descriptor, path)
    _copy(kept, descriptor)
    kept.unlink()


def _write_kept(descriptor: int, path: str) -> Path:
    """All lines that stay, on disk beside the file: complete, or not there."""
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
    """Opens for the owner alone: the answers may be secret."""
    return os.open(name, flags, 0o600)


def _copy(kept: Path, descriptor: int) -> None:
    """Write `kept` over the file, which is never shorter than it on the way."""
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
    """Do an interrupted rewrite again. A file shorter than what was kept of it is another file."""
    kept = kept_path(descriptor, path)
    if not kept.exists():
        return
    if kept.stat().st_size <= os.fstat(descriptor).st_size:
        _copy(kept, descriptor)
    kept.unlink()
