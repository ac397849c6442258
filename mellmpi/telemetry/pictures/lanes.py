"""The lanes of the timeline: a worker's KV in use, its states, migrations and preemptions."""

import math
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from mellmpi.telemetry.pictures.style import (
    HATCH,
    INK,
    KV_EDGE,
    KV_FILL,
    MODES,
    MUTED,
    PREEMPTED,
    RULE,
    SHADES,
    hide_frame,
)
from mellmpi.telemetry.series import INACTIVE, MoveRecord, Series, WorkerSeries

LANE = 0.8  # height of a lane, as a share of the distance between two
NARROW = 0.06  # share of the time axis; the state of a shorter span is not written


def lanes_height_in(num_lanes: int) -> float:
    """Height of all lanes in inches: 0.8 per lane where they are few, at most 12."""
    return min(12.0, max(1.2, min(0.8 * num_lanes, 2.8 + 0.45 * num_lanes)))


def draw_lanes(axes: Axes, series: Series) -> None:
    """Draw one lane per worker, the first at the top."""
    hide_frame(axes)
    bottoms = {w: len(series.workers) - 1 - i for i, w in enumerate(series.workers)}
    lane_bytes = lane_height_bytes(series)
    font = min(9.0, 45 * lanes_height_in(len(bottoms)) / max(1, len(bottoms)))  # fits into a lane
    for worker, bottom in bottoms.items():
        _shades(axes, series.workers[worker], bottom, series.end_s, font)
        _kv_in_use(axes, series.workers[worker], bottom, series.end_s, lane_bytes)
    moves = drawn_moves(series)
    for mode in MODES:
        _moves(axes, [m for m in moves if m.mode == mode], bottoms, len(moves))
    _preemptions(axes, [(t, bottoms[w]) for t, w in series.preemptions if w in bottoms])
    axes.set_ylim(-0.12, max(1, len(bottoms)) - 0.08)
    _lane_labels(axes, series, bottoms)


def _lane_labels(axes: Axes, series: Series, bottoms: dict[int, int]) -> None:
    every = 1 if len(bottoms) <= 32 else 4
    shown = [w for i, w in enumerate(bottoms) if i % every == 0]
    name = "worker {}\n{} arena" if len(bottoms) <= 12 else "worker {}" if every == 1 else "{}"
    labels = [name.format(w, byte_text(series.workers[w].capacity_bytes)) for w in shown]
    axes.set_yticks([bottoms[w] + LANE / 2 for w in shown], labels)
    if every > 1:
        axes.set_ylabel("worker", color=MUTED, fontsize=9)


def _shades(axes: Axes, worker: WorkerSeries, bottom: int, end_s: float, font: float) -> None:
    for start, end, state in visible_spans(worker, end_s):
        if state in SHADES:
            face, hatch = SHADES[state]
            axes.fill_between(
                [start, end],
                bottom,
                bottom + LANE,
                facecolor=face,
                hatch=hatch,
                edgecolor=HATCH,
                lw=0,
                zorder=0.5,
            )
        if state in INACTIVE and end - start > NARROW * end_s:
            _state_name(axes, (start + end) / 2, bottom, state, font)
        if state == "lost":
            axes.plot(start, bottom + LANE / 2, "X", ms=11, mec="white", mfc=INK, zorder=6)


def _state_name(axes: Axes, x: float, bottom: int, state: str, font: float) -> None:
    axes.text(
        x,
        bottom + LANE / 2,
        state,
        ha="center",
        va="center_baseline",
        fontsize=font,
        color=MUTED,
        zorder=3,
        bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"},
    )


def visible_spans(worker: WorkerSeries, end_s: float) -> Iterator[tuple[float, float, str]]:
    """(start, end, state) of each span that the picture shows, in order of time."""
    ends = [*worker.state_times_s[1:], end_s]
    for start, end, state in zip(worker.state_times_s, ends, worker.states, strict=True):
        if end > 0:
            yield max(0.0, start), end, state


def lane_height_bytes(series: Series) -> int:
    """Bytes that the height of a lane stands for: the largest arena, or less if little is used."""
    full = max((w.capacity_bytes for w in series.workers.values()), default=1)
    peak = max((max(w.kv_bytes, default=0) for w in series.workers.values()), default=0)
    zoomed = 2 ** math.ceil(math.log2(max(1.0, 1.05 * peak)))
    return zoomed if peak and zoomed <= full / 2 else max(1, full)


def _kv_in_use(
    axes: Axes, worker: WorkerSeries, bottom: int, end_s: float, lane_bytes: int
) -> None:
    capacity = worker.capacity_bytes / lane_bytes
    for edge in (0.0, capacity) if capacity <= 1 else (0.0,):
        axes.plot([0, end_s], [bottom + LANE * edge] * 2, color=RULE, lw=0.6, zorder=1)
    if not worker.kv_times_s:
        return
    times = np.array([*worker.kv_times_s, end_s])
    used = np.array([*worker.kv_bytes, worker.kv_bytes[-1]])
    top = bottom + LANE * np.clip(used / lane_bytes, 0, 1)
    axes.fill_between(times, bottom, top, step="post", color=KV_FILL, lw=0, zorder=2)
    busy = np.where(used > 0, top, np.nan)
    axes.step(times, busy, where="post", color=KV_EDGE, lw=0.8, zorder=2)


def drawn_moves(series: Series) -> list[MoveRecord]:
    """Migrations between two workers of the picture; a recompute may end where it began."""
    lanes = series.workers
    moved = (m for m in series.moves if m.outcome == "moved" and m.src != m.dst)
    return [m for m in moved if m.src in lanes and m.dst in lanes]


def _moves(axes: Axes, moves: list[MoveRecord], bottoms: dict[int, int], num_all: int) -> None:
    """Draw a dot at the source, a line, an arrowhead at the destination; thinner if many."""
    if not moves:
        return
    color, style = MODES[moves[0].mode]
    scale = min(1.0, (60 / num_all) ** 0.5)
    size, alpha = max(3.0, 5 * scale), max(0.7, scale)
    ends = [
        ((m.start_s, bottoms[m.src] + LANE / 2), (m.end_s, bottoms[m.dst] + LANE / 2))
        for m in moves
    ]
    axes.add_collection(
        LineCollection(
            ends,
            colors=color,
            linestyles=[style],
            lw=max(0.55, 1.3 * scale),
            alpha=alpha,
            zorder=4,
        ),
        autolim=False,
    )
    starts = np.array([start for start, _ in ends])
    axes.plot(*starts.T, "o", ms=0.6 * size, color=color, alpha=alpha, mew=0, zorder=4)
    for marker, down in (("v", True), ("^", False)):
        heads = [b for a, b in ends if (b[1] < a[1]) == down]
        if heads:
            axes.plot(
                *np.array(heads).T, marker, ms=size, color=color, alpha=alpha, mew=0, zorder=5
            )


def _preemptions(axes: Axes, preemptions: list[tuple[float, int]]) -> None:
    if preemptions:
        times, bottoms = np.array(preemptions).T
        axes.vlines(
            times,
            bottoms - 0.1,
            bottoms + 0.16,
            color=PREEMPTED,
            lw=1.1,
            zorder=5,
            label="preemption",
        )


def byte_text(n: int) -> str:
    """A number of bytes as text, such as "64 MiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} B"
