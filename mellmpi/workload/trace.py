"""Reads a trace file into a workload."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mellmpi.workload.description import describe
from mellmpi.workload.formats import Format, recognise
from mellmpi.workload.requests import LONGEST_S, Workload
from mellmpi.workload.rows import TraceFile


def load(path: str | Path) -> Workload:
    """Read a trace, gzipped or not, in one sequential pass: it may be a pipe.

    `source` of the result describes the recognised format in one line. ValueError names the file,
    the line, the column, and the expected content.
    """
    file, requests = TraceFile(Path(path)), _Requests()
    for line, columns in file.rows():
        try:
            requests.add(columns)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
    if requests.form is None or not requests.arrivals:
        raise ValueError(f"{path}, line 1: no requests in it; one row a request is expected")
    return requests.workload(file)


@dataclass
class _Requests:
    """Rows read so far, column by column."""

    form: Format | None = None  # format of the rows so far
    names: frozenset[str] = frozenset()  # columns of the last row
    arrivals: "array[float]" = field(default_factory=lambda: array("d"))  # seconds
    prompts: "array[int]" = field(default_factory=lambda: array("q"))  # tokens
    outputs: "array[int]" = field(default_factory=lambda: array("q"))  # tokens
    models: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    dropped: int = 0

    def add(self, columns: Mapping[str, Any]) -> None:
        """Append one row. ValueError names the column."""
        form = self._recognised(columns)
        arrival_s = form.arrival_s(columns)
        prompt, output = form.tokens(columns, form.prompt), form.tokens(columns, form.output)
        if min(prompt, output) == 0:
            self.dropped += 1
            return
        self._check_time(form, arrival_s)
        self.arrivals.append(arrival_s)
        self.prompts.append(prompt)
        self.outputs.append(output)
        self.models.append(form.label(columns, form.model))
        self.sessions.append(form.label(columns, form.session))

    def _recognised(self, columns: Mapping[str, Any]) -> Format:
        if self.form is None or columns.keys() != self.names:
            form = recognise(columns.keys())
            if self.form not in (None, form):
                raise ValueError(f"columns of {form.name} after rows of another format")
            self.form, self.names = form, frozenset(columns)
        return self.form

    def _check_time(self, form: Format, arrival_s: float) -> None:
        if self.arrivals and arrival_s < self.arrivals[-1]:
            raise ValueError(
                f"{form.arrival} is before that of the row above; sort the trace by time"
            )
        first_s = self.arrivals[0] if self.arrivals else arrival_s
        if arrival_s - (first_s if form.from_first else 0.0) > LONGEST_S:
            counted = f"; it counts {form.unit}" if form.unit else ""
            raise ValueError(
                f"{form.arrival} is over {LONGEST_S / 86_400:.0f} days after the "
                f"start of the trace{counted}"
            )

    def workload(self, file: TraceFile) -> Workload:
        """Return all rows, at least one, as a workload."""
        assert self.form is not None
        arrival_s = np.array(self.arrivals, np.float64)
        if self.form.from_first:
            arrival_s = arrival_s - arrival_s[0]
        workload = Workload(
            arrival_s,
            np.array(self.prompts, np.int64),
            np.array(self.outputs, np.int64),
            tuple(self.models),
            tuple(self.sessions),
            self.dropped,
        )
        return replace(workload, source=describe(file, self.form, workload))
