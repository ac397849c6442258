"""The picture of a run: KV in use a worker over time, and the requests that moved between them.

Colours are distinguishable to colour-blind readers, and every kind of mark also differs in shape,
so that a grey print can be read. Needs matplotlib: import this module where a picture is wanted.
"""

import io
import math
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from mellmpi.telemetry.series import INACTIVE, MoveRecord, Series, WorkerSeries

INK, MUTED, RULE = "#1A1A1A", "#6B6B6B", "#D4D4D4"
KV_FILL, KV_EDGE = "#A9D0E6", "#2C7FB8"
MOVES = {  # mode -> colour, line style
    "transfer": (INK, "solid"),
    "recompute": ("#D55E00", (0, (3, 1.5))),
    "split": ("#00795C", (0, (4, 1.5, 1, 1.5))),
}
PREEMPTED = "#AA3377"
HATCH = "#C4C4C4"
SHADES = {  # worker state -> background, hatch; "active" has none
    "starting": ("#F2F2F2", ""),
    "waking": ("#FFF1B8", ""),
    "draining": ("#FFF1B8", ""),
    "parking": ("#FFF1B8", ""),
    "parked": ("#E9E9E9", "////"),
    "lost": ("#E9E9E9", "xxxx"),
}
LANE = 0.8  # of the distance between two lanes
SUFFIXES = tuple(  # of the pictures that can be drawn
    f".{kind}"
    for kind in FigureCanvasBase.get_supported_filetypes()
    if kind != "pgf"  # wants TeX
)
NARROW = 0.06  # share of the time axis below which a span goes without its name
UNITS = ((3 * 3600, 3600, "h"), (600, 60, "min"), (0, 1, "s"))  # from, seconds, name


def draw(series: Series, suffix: str) -> bytes:
    """The timeline as a picture of the kind that `suffix`, one of SUFFIXES, names."""
    stream = io.BytesIO()
    figure(series).savefig(stream, format=suffix[1:].lower(), dpi=150)
    return stream.getvalue()


def figure(series: Series) -> Figure:
    """A strip with the number of active workers, and below it one lane a worker."""
    lanes_in = _lanes_in(len(series.workers))
    fig = Figure(figsize=(12, lanes_in + 2.4), layout="constrained")
    top, lanes = fig.subplots(
        2, 1, sharex=True, height_ratios=[0.8, lanes_in], gridspec_kw={"hspace": 0.02}
    )
    _titles(top, series)
    _active_strip(top, series)
    _lanes(lanes, series)
    _time_axis(lanes, series.end_s)
    fig.legend(
        handles=list(_legend(series)),
        loc="outside lower center",
        ncols=8,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=2.2,
        columnspacing=1.6,
    )
    return fig


def _lanes_in(num_lanes: int) -> float:
    """Height of all lanes, inches: 0.8 each where they are few, 12 at most."""
    return min(12.0, max(1.2, min(0.8 * num_lanes, 2.8 + 0.45 * num_lanes)))


# --- text ---


def _titles(axes: Axes, series: Series) -> None:
    axes.set_title(_title(series), loc="left", fontsize=13, fontweight="bold", color=INK, pad=26)
    axes.annotate(
        _subtitle(series),
        (0, 1),
        xytext=(0, 10),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=10,
        color=MUTED,
    )


def _title(series: Series) -> str:
    r = series.report
    total = r["gpu_seconds_total"]
    share = f" ({r['gpu_seconds_active'] / total:.0%})" if total else ""
    return (
        f"{_plural(r['requests'], 'request')} in {_duration(r['wall_s'])}  ·  "
        f"{r['gpu_seconds_active']:,.0f} of {total:,.0f} GPU-seconds{share}"
    )


def _subtitle(series: Series) -> str:
    r = series.report
    moved = [f"{n} by {mode}" for mode, n in r["migrations"].items() if mode != "failed" and n]
    parts = [
        f"{r['output_throughput']:,.0f} tokens/s",
        f"migrations: {', '.join(moved)}" if moved else "no migration",
        _plural(r["preemptions"], "preemption"),
    ]
    if r["downtime_ms"]["p50"] is not None:
        parts.insert(2, f"median downtime {r['downtime_ms']['p50']:,.0f} ms")
    if r["workers_lost"]:
        parts.append(f"{_plural(r['workers_lost'], 'worker')} lost")
    return "  ·  ".join(parts)


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _bytes(n: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} B"


# --- axes ---


def _bare(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(length=0, colors=MUTED, labelsize=9)


def _active_strip(axes: Axes, series: Series) -> None:
    _bare(axes)
    times, counts = _active_workers(series)
    axes.fill_between(times, counts, step="post", color="#DCDCDC", lw=0)
    axes.step(times, counts, where="post", color=MUTED, lw=1.2)
    num_workers, mean = max(1, len(series.workers)), series.report["active_workers_mean"]
    axes.set_ylim(0, num_workers * 1.08)
    axes.set_yticks([0, num_workers])
    axes.set_ylabel("active\nworkers", rotation=0, ha="right", va="center", color=MUTED)
    axes.plot([0, series.end_s], [mean] * 2, color=INK, lw=0.9, ls=(0, (1, 2)))
    axes.annotate(
        f"mean {mean:.2f}",
        (0, mean),
        xytext=(5, -2),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        va="top",
        fontsize=9,
        color=INK,
    )


def _active_workers(series: Series) -> tuple[list[float], list[int]]:
    """Step function: workers that hold a device. Changes before the first request are merged."""
    changes = []
    for worker in series.workers.values():
        before = 0
        for t, state in zip(worker.state_times_s, worker.states, strict=True):
            now = int(state not in INACTIVE)
            changes.append((max(0.0, t), now - before))
            before = now
    changes.sort()
    times = [0.0, *(t for t, _ in changes), series.end_s]
    counts = np.cumsum([0, *(c for _, c in changes), 0])
    return times, counts.tolist()


def _time_axis(axes: Axes, end_s: float) -> None:
    _, seconds, name = next(u for u in UNITS if end_s >= u[0])
    axes.set_xlim(0, max(end_s, 1e-3))
    ticks = MaxNLocator(nbins=12, steps=[1, 2, 5, 10]).tick_values(0, end_s / seconds)
    axes.set_xticks([x * seconds for x in ticks if x * seconds <= end_s], None)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / seconds:g}")
    axes.set_xlabel(f"time since the first request, {name}", color=MUTED, fontsize=9)


# --- lanes ---


def _lanes(axes: Axes, series: Series) -> None:
    _bare(axes)
    bottoms = {w: len(series.workers) - 1 - i for i, w in enumerate(series.workers)}
    lane_bytes = _lane_bytes(series)
    font = min(9.0, 45 * _lanes_in(len(bottoms)) / max(1, len(bottoms)))  # fits into a lane
    for worker, bottom in bottoms.items():
        _shades(axes, series.workers[worker], bottom, series.end_s, font)
        _kv(axes, series.workers[worker], bottom, series.end_s, lane_bytes)
    moves = _moved(series)
    for mode in MOVES:
        _moves(axes, [m for m in moves if m.mode == mode], bottoms, len(moves))
    _ticks(axes, [(t, bottoms[w]) for t, w in series.preemptions if w in bottoms])
    axes.set_ylim(-0.12, max(1, len(bottoms)) - 0.08)
    _lane_labels(axes, series, bottoms)


def _lane_labels(axes: Axes, series: Series, bottoms: dict[int, int]) -> None:
    every = 1 if len(bottoms) <= 32 else 4
    shown = [w for i, w in enumerate(bottoms) if i % every == 0]
    name = "worker {}\n{} arena" if len(bottoms) <= 12 else "worker {}" if every == 1 else "{}"
    labels = [name.format(w, _bytes(series.workers[w].capacity_bytes)) for w in shown]
    axes.set_yticks([bottoms[w] + LANE / 2 for w in shown], labels)
    if every > 1:
        axes.set_ylabel("worker", color=MUTED, fontsize=9)


def _shades(axes: Axes, worker: WorkerSeries, bottom: int, end_s: float, font: float) -> None:
    for start, end, state in _spans(worker, end_s):
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
            _name(axes, (start + end) / 2, bottom, state, font)
        if state == "lost":
            axes.plot(start, bottom + LANE / 2, "X", ms=11, mec="white", mfc=INK, zorder=6)


def _name(axes: Axes, x: float, bottom: int, state: str, font: float) -> None:
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


def _spans(worker: WorkerSeries, end_s: float) -> Iterator[tuple[float, float, str]]:
    """(start, end, state) of what is visible, in order."""
    ends = [*worker.state_times_s[1:], end_s]
    for start, end, state in zip(worker.state_times_s, ends, worker.states, strict=True):
        if end > 0:
            yield max(0.0, start), end, state


def _lane_bytes(series: Series) -> int:
    """What the height of every lane means: the largest arena, or less where little was used."""
    full = max((w.capacity_bytes for w in series.workers.values()), default=1)
    peak = max((max(w.kv_bytes, default=0) for w in series.workers.values()), default=0)
    zoomed = 2 ** math.ceil(math.log2(max(1.0, 1.05 * peak)))
    return zoomed if peak and zoomed <= full / 2 else max(1, full)


def _kv(axes: Axes, worker: WorkerSeries, bottom: int, end_s: float, lane_bytes: int) -> None:
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


def _moved(series: Series) -> list[MoveRecord]:
    """A recompute may end where it began: that is no arrow."""
    lanes = series.workers
    moved = (m for m in series.moves if m.outcome == "moved" and m.src != m.dst)
    return [m for m in moved if m.src in lanes and m.dst in lanes]


def _moves(axes: Axes, moves: list[MoveRecord], bottoms: dict[int, int], num_all: int) -> None:
    """A dot at the source, a line, an arrowhead at the destination; finer where there are many."""
    if not moves:
        return
    color, style = MOVES[moves[0].mode]
    crowd = min(1.0, (60 / num_all) ** 0.5)
    size, alpha = max(3.0, 5 * crowd), max(0.7, crowd)
    ends = [
        ((m.start_s, bottoms[m.src] + LANE / 2), (m.end_s, bottoms[m.dst] + LANE / 2))
        for m in moves
    ]
    axes.add_collection(
        LineCollection(
            ends,
            colors=color,
            linestyles=[style],
            lw=max(0.55, 1.3 * crowd),
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


def _ticks(axes: Axes, preemptions: list[tuple[float, int]]) -> None:
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


# --- legend ---


def _legend(series: Series) -> Iterator[Line2D | Patch]:
    """Only what the picture contains."""
    height = _bytes(_lane_bytes(series))
    yield Patch(facecolor=KV_FILL, edgecolor=KV_EDGE, label=f"KV in use (lane height {height})")
    modes = {m.mode for m in _moved(series)}
    for mode, (color, style) in MOVES.items():
        if mode in modes:
            yield Line2D([], [], color=color, ls=style, marker=">", ms=5, label=f"{mode}")
    states = {s for w in series.workers.values() for _, _, s in _spans(w, series.end_s)}
    if states & {"draining", "parking", "waking"}:
        yield Patch(facecolor=SHADES["draining"][0], label="draining, parking or waking")
    if "parked" in states:
        face, hatch = SHADES["parked"]
        yield Patch(facecolor=face, hatch=hatch, edgecolor=HATCH, label="parked")
    if "lost" in states:
        yield Line2D([], [], color=INK, marker="X", ms=8, ls="", label="lost")
    if series.preemptions:
        yield Line2D([], [], color=PREEMPTED, marker="|", ms=9, mew=1.5, ls="", label="preemption")
