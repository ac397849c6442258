"""Figures of migrations: outcomes, durations, bytes and downtimes, predicted beside actual."""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mellmpi import protocol as p
from mellmpi.telemetry.cells import QUEUE, Cell, Rows
from mellmpi.telemetry.histogram import MOVE_BYTES, MOVE_S, Histogram
from mellmpi.telemetry.predictions import Predictions
from mellmpi.telemetry.series import Distribution, MoveRecord, NormalEquations, Sample

MODES = ("transfer", "recompute", "split")
MOST_KINDS = 32  # values of a label


@dataclass(slots=True)
class Live:
    """One request between Submit and its end."""

    submit_s: float
    num_prompt: int
    model: str
    cell: Cell  # of model and owner
    worker: int = QUEUE  # its owner
    placed: bool = False  # it has had an owner
    num_tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    reported_s: float | None = None  # time of the last token in a StepReport
    src: int | None = None  # source of the migration under way
    migration: p.MigrationStarted | None = None  # the newest one
    moved_to: int | None = None  # destination of a migration, until its first token


class Kinds:
    """Label values from free text: its words without numbers; "other" after `most` of them."""

    def __init__(self, most: int = MOST_KINDS) -> None:
        self._known: set[str] = set()
        self._most = most

    def of(self, text: str) -> str:
        kind = " ".join(re.sub(r"\S*\d\S*", "", text).split())[:40]
        if kind not in self._known and len(self._known) >= self._most:
            return "other"
        self._known.add(kind)
        return kind


@dataclass(slots=True)
class _OfMode:
    """Successful migrations of one model in one mode."""

    seconds: Histogram = field(default_factory=lambda: Histogram(MOVE_S))
    predicted: Histogram = field(default_factory=lambda: Histogram(MOVE_S))
    downtime: Histogram = field(default_factory=lambda: Histogram(MOVE_S))
    num_bytes: Histogram = field(default_factory=lambda: Histogram(MOVE_BYTES))


class Moves:
    """Observes the migrations of all requests."""

    def __init__(self) -> None:
        self.records, self.predictions = Sample[MoveRecord](), Predictions()
        self.outcomes: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()  # by mode
        self.num_bytes, self.downtime = 0, Distribution()
        self.transfers = NormalEquations("transfers", "bytes")  # a fit of seconds by these counts
        self._started: dict[int, tuple[float, str, p.MigrationStarted]] = {}
        self._counts: Counter[tuple[str, ...]] = Counter()  # by the labels of `migrations`
        self._modes: dict[tuple[str, str], _OfMode] = {}  # by model and mode
        self._reasons, self._kinds = Kinds(), Kinds()

    def started(self, now: float, live: Live | None, started: p.MigrationStarted) -> None:
        model = live.model if live is not None else ""
        self._started[started.request_id] = now, model, started
        if live is not None:
            live.src, live.migration = started.src, started

    def ended(self, now: float, live: Live | None, e: p.MigrationEnded) -> None:
        """`live` is None if the request has ended."""
        self.outcomes[e.outcome] += 1
        start_s, model, started = self._started.pop(e.request_id, (now, "", None))
        self.records.add(
            MoveRecord(e.request_id, e.mode, e.src, e.dst, start_s, now, e.num_bytes, e.outcome)
        )
        reason = self._reasons.of(started.reason if started is not None else "")
        ends = str(e.src), str(e.dst)
        self._counts[model, *ends, e.mode, reason, self._kinds.of(e.outcome)] += 1
        if e.outcome != "moved":
            if live is not None:
                live.src = None
            return
        self.moved[e.mode] += 1
        self._compare(model, now - start_s, started, e)
        self.num_bytes += e.num_bytes
        if e.num_bytes:
            self.transfers.add((1, e.num_bytes), e.transfer_s)
        if live is not None and live.src is not None:  # None: the first token came before
            live.moved_to = e.dst

    def _compare(
        self, model: str, seconds: float, started: p.MigrationStarted | None, e: p.MigrationEnded
    ) -> None:
        if started is None:
            return
        self.predictions.add(e.mode, "seconds", started.predicted_s, seconds)
        self.predictions.add(e.mode, "bytes", started.num_bytes, e.num_bytes)
        figures = self._mode(model, e.mode)
        figures.seconds.add(seconds)
        figures.predicted.add(started.predicted_s)
        figures.num_bytes.add(e.num_bytes)

    def _mode(self, model: str, mode: str) -> _OfMode:
        return self._modes.setdefault((model, mode), _OfMode())

    def computed(self, now: float, live: Live, worker: int) -> None:
        """Tokens of a migrating request from `worker`: end its downtime, unless from its source."""
        if live.moved_to is None and worker == live.src:
            return
        if live.reported_s is not None:
            downtime_s = now - live.reported_s
            self.downtime.add(downtime_s)
            if (started := live.migration) is not None:
                predicted_s = started.predicted_downtime_s
                self.predictions.add(started.mode, "downtime_s", predicted_s, downtime_s)
                self._mode(live.model, started.mode).downtime.add(downtime_s)
        live.moved_to, live.src = None, None

    def by_mode(self) -> dict[str, int]:
        """Successful migrations by mode, and all others as "failed"; see `outcomes`."""
        failed = sum(self.outcomes.values()) - self.outcomes["moved"]
        return {mode: self.moved[mode] for mode in MODES} | {"failed": failed}

    def report(self) -> dict[str, Any]:
        return {
            "migrations": self.by_mode(),
            "migration_outcomes": dict(self.outcomes),
            "migrated_bytes": self.num_bytes,
            "migration_prediction_error": self.predictions.error("seconds"),
            "migration_predictions": self.predictions.to_dict(),
            "downtime_ms": self.downtime.percentiles_ms(),
        }

    def rows(self) -> dict[str, Rows]:
        """{metric: samples}; labels as in `FAMILIES`."""
        found: dict[str, Rows] = {"migrations": sorted(self._counts.items())}
        for labels, of in sorted(self._modes.items()):
            found.setdefault("migration_seconds", []).append((labels, of.seconds.read()))
            found.setdefault("migration_predicted_seconds", []).append(
                (labels, of.predicted.read())
            )
            found.setdefault("migration_downtime_seconds", []).append((labels, of.downtime.read()))
            found.setdefault("migration_bytes", []).append((labels, of.num_bytes.read()))
        return found
