"""Arrivals and lengths: public traces, recognised by what is in them, and seeded generators."""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Workload:
    """One row a request, in the order of arrival; times in seconds."""

    arrival_s: np.ndarray  # float64, ascending
    prompt_tokens: np.ndarray  # int64, at least 1
    output_tokens: np.ndarray  # int64, at least 1
    model: tuple[str, ...]  # one a row, "" where the trace has none
    session: tuple[str, ...]  # likewise
    dropped: int = 0  # rows of requests that failed where the trace was taken

    def __len__(self) -> int:
        return len(self.arrival_s)

    def faster(self, factor: float) -> "Workload":
        """The same requests, arriving `factor` times as fast."""
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"--rate-scale must be over 0, not {factor}")
        return replace(self, arrival_s=self.arrival_s / factor)

    def longer(self, factor: float) -> "Workload":
        """The same arrivals; prompts and outputs `factor` times as long, at least one token."""
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(f"--length-scale must be over 0, not {factor}")

        def scaled(tokens: np.ndarray) -> np.ndarray:
            return np.maximum(1, np.rint(tokens * factor)).astype(np.int64)

        return replace(self, prompt_tokens=scaled(self.prompt_tokens),
                       output_tokens=scaled(self.output_tokens))  # fmt: skip

    def first(self, count: int) -> "Workload":
        """Only so many requests."""
        return replace(
            self, arrival_s=self.arrival_s[:count], prompt_tokens=self.prompt_tokens[:count],
            output_tokens=self.output_tokens[:count], model=self.model[:count],
            session=self.session[:count],
        )  # fmt: skip


def _seconds(value: Any) -> float:
    return float(value)


def _milliseconds(value: Any) -> float:
    return float(value) / 1000


def _date(value: Any) -> float:
    # Python reads six decimals; Azure writes seven.
    whole, _, decimals = str(value).partition(".")
    since = datetime.fromisoformat(whole) - datetime(2000, 1, 1)
    return since.total_seconds() + (float(f"0.{decimals}") if decimals else 0.0)


@dataclass(frozen=True)
class Format:
    """Which column means what in one publisher's files."""

    name: str
    arrival: str
    prompt: str
    output: str
    model: str
    session: str
    seconds: Callable[[Any], float]
    zero_is_failure: bool = False  # a request without tokens is one that failed
    from_first: bool = True  # times count from the first row

    @property
    def needs(self) -> tuple[str, str, str]:
        return self.arrival, self.prompt, self.output


FORMATS = (
    Format("uniform", "arrival_s", "prompt_tokens", "output_tokens", "model", "session", _seconds,
           from_first=False),
    Format("Azure 2023", "TIMESTAMP", "ContextTokens", "GeneratedTokens", "", "", _date),
    Format("BurstGPT", "Timestamp", "Request tokens", "Response tokens", "Model", "Session ID",
           _seconds, zero_is_failure=True),
    Format("Mooncake", "timestamp", "input_length", "output_length", "", "", _milliseconds),
)  # fmt: skip

Rows = Iterator[tuple[int, dict[str, Any]]]  # (line in the file, columns)


def load(path: str | Path) -> Workload:
    """Read a trace, gzipped or not. ValueError names file and line, and what is expected there."""
    rows: list[tuple[float, int, int, str, str]] = []
    dropped, last_s, form = 0, 0.0, None
    for line, columns in _rows(Path(path)):
        where = f"{path}, line {line}"
        form = form or _recognise(columns, where)
        row = _row(form, columns, where)
        if form.zero_is_failure and min(row[1], row[2]) == 0:
            dropped += 1
            continue
        if min(row[1], row[2]) < 1:
            raise ValueError(f"{where}: a request has at least one prompt and one output token")
        if not math.isfinite(row[0]) or row[0] < 0:
            raise ValueError(f"{where}: {form.arrival} is {row[0]}; a time is 0 or more")
        if rows and row[0] < last_s:
            raise ValueError(f"{where}: {form.arrival} is before that of the row above; "
                             "sort the trace by time")  # fmt: skip
        last_s = row[0]
        rows.append(row)
    if form is None or not rows:
        raise ValueError(f"{path}, line 1: no requests in it; one row a request is expected")
    workload = _workload(rows, dropped)
    if form.from_first:
        return replace(workload, arrival_s=workload.arrival_s - workload.arrival_s[0])
    return workload


def _workload(rows: list[tuple[float, int, int, str, str]], dropped: int) -> Workload:
    arrival_s, prompt, output, model, session = zip(*rows, strict=True)
    return Workload(
        np.array(arrival_s, np.float64), np.array(prompt, np.int64), np.array(output, np.int64),
        model, session, dropped,
    )  # fmt: skip


def _rows(path: Path) -> Rows:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        opened = gzip.open if packed else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as text:
            first = text.readline()
            text.seek(0)
            yield from (_json_rows if first.lstrip().startswith("{") else _csv_rows)(path, text)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _csv_rows(path: Path, text: Any) -> Rows:
    reader = csv.DictReader(text)
    try:
        for columns in reader:
            yield reader.line_num, columns
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no CSV: {error}") from error


def _json_rows(path: Path, text: Any) -> Rows:
    for line, entry in enumerate(text, start=1):
        if not entry.strip():
            continue
        try:
            columns = json.loads(entry)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {line}: no JSON: {error}") from error
        if not isinstance(columns, dict):
            raise ValueError(f"{path}, line {line}: one JSON object a line is expected")
        yield line, columns


def _recognise(columns: dict[str, Any], where: str) -> Format:
    for form in FORMATS:
        if columns.keys() >= set(form.needs):
            return form
    known = "; ".join(f"{form.name}: {', '.join(form.needs)}" for form in FORMATS)
    found = ", ".join(map(str, columns))
    raise ValueError(f"{where}: unknown columns ({found[:200]}). Known formats: {known}")


def _row(form: Format, columns: dict[str, Any], where: str) -> tuple[float, int, int, str, str]:
    def read(name: str, how: Callable[[Any], Any], what: str) -> Any:
        value = columns.get(name)
        if value is None or isinstance(value, bool):
            raise ValueError(f"{where}: {name} is missing; {what} is expected")
        try:
            return how(value)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{where}: {name} is {value!r}; {what} is expected") from error

    return (
        read(form.arrival, form.seconds, "a time"),
        read(form.prompt, _count, "a whole number of tokens"),
        read(form.output, _count, "a whole number of tokens"),
        str(columns.get(form.model) or ""), str(columns.get(form.session) or ""),
    )  # fmt: skip


def _count(value: Any) -> int:
    number = float(value)
    if not number.is_integer():
        raise ValueError(value)
    return int(number)


def gamma(num_requests: int, rate: float, cv: float, prompt: float, output: float,
          seed: int) -> Workload:  # fmt: skip
    """Arrivals with this rate (1/s) and variation (1: Poisson); lognormal lengths of these means.

    Of the lengths, the standard deviation equals the mean.
    """
    if num_requests < 1 or min(rate, cv, prompt, output) <= 0:
        raise ValueError("requests, rate, cv, prompt and output must be over 0")
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(1 / cv**2, cv**2 / rate, num_requests)
    sigma = math.sqrt(math.log(2))

    def lengths(mean: float) -> np.ndarray:
        drawn = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, num_requests)
        return np.maximum(1, drawn).astype(np.int64)

    nothing = ("",) * num_requests
    return Workload(np.cumsum(gaps), lengths(prompt), lengths(output), nothing, nothing)
