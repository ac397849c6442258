"""What a batch output file already answers, so that a restart does only the rest."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def finished_ids(output: Path) -> frozenset[str]:
    """The custom_ids answered with success in `output`, which is made ready to be appended to.

    A torn last line, and lines that report an error, are taken out: their requests run again.
    ValueError if the file is something else than a batch output; it is then left as it is.
    """
    if not output.exists():
        return frozenset()
    finished, whole = set(), True
    for _, line in _lines(output):
        result = _result(line)
        if result is None or not _succeeded(result):
            whole = False
        else:
            finished.add(result["custom_id"])
            whole &= line.endswith(b"\n")
    if not whole:
        _keep_successes(output)
    return frozenset(finished)


def _lines(output: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; all but the last, which may be torn, are results or a ValueError."""
    with output.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            if line.endswith(b"\n") and _result(line) is None:
                raise ValueError(
                    f"{output} exists and is no batch output (line {number} is not a result); "
                    "remove it, or give another name with -o"
                )
            yield number, line


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


def _keep_successes(output: Path) -> None:
    kept = output.with_name(f".{output.name}.{os.getpid()}")
    with kept.open("wb") as stream:
        for _, line in _lines(output):
            result = _result(line)
            if result is not None and _succeeded(result):
                stream.write(line.rstrip(b"\n") + b"\n")
    os.replace(kept, output)
