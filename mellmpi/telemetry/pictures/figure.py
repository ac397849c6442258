"""The picture of a run: a strip of active workers, one lane per worker, a legend.

Needs matplotlib: import this module only where a picture is wanted.
"""

import io
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from mellmpi.telemetry.pictures.lanes import (
    byte_text,
    draw_lanes,
    drawn_moves,
    lane_height_bytes,
    lanes_height_in,
    visible_spans,
)
from mellmpi.telemetry.pictures.style import (
    HATCH,
    INK,
    KV_EDGE,
    KV_FILL,
    MODES,
    MUTED,
    PREEMPTED,
    SHADES,
    hide_frame,
)
from mellmpi.telemetry.series import INACTIVE, Series

SUFFIXES = tuple(  # of the pictures that can be drawn
    f".{kind}"
    for kind in FigureCanvasBase.get_supported_filetypes()
    if kind != "pgf"  # needs TeX
)
UNITS = ((3 * 3600, 3600, "h"), (600, 60, "min"), (0, 1, "s"))  # used from s, s per unit, name


def draw(series: Series, suffix: str) -> bytes:
    """The timeline as a picture; `suffix`, one of SUFFIXES, names its format."""
    stream = io.BytesIO()
    figure(series).savefig(stream, format=suffix[1:].lower(), dpi=150)
    return stream.getvalue()


def figure(series: Series) -> Figure:
    """A strip with the number of active workers, and below it one lane per worker."""
    lanes_in = lanes_height_in(len(series.workers))
    fig = Figure(figsize=(12, lanes_in + 2.4), layout="constrained")
    top, lanes = fig.subplots(
        2, 1, sharex=True, height_ratios=[0.8, lanes_in], gridspec_kw={"hspace": 0.02}
    )
    _titles(top, series)
    _active_strip(top, series)
    draw_lanes(lanes, series)
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


# --- axes ---


def _active_strip(axes: Axes, series: Series) -> None:
    hide_frame(axes)
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
    """(times, counts) of workers that hold a device, from the first request on."""
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


# --- legend ---


def _legend(series: Series) -> Iterator[Line2D | Patch]:
    """Entries for the marks that the picture contains."""
    height = byte_text(lane_height_bytes(series))
    yield Patch(facecolor=KV_FILL, edgecolor=KV_EDGE, label=f"KV in use (lane height {height})")
    modes = {m.mode for m in drawn_moves(series)}
    for mode, (color, style) in MODES.items():
        if mode in modes:
            yield Line2D([], [], color=color, ls=style, marker=">", ms=5, label=mode)
    states = {s for w in series.workers.values() for _, _, s in visible_spans(w, series.end_s)}
    if states & {"draining", "parking", "waking"}:
        yield Patch(facecolor=SHADES["draining"][0], label="draining, parking or waking")
    if "parked" in states:
        face, hatch = SHADES["parked"]
        yield Patch(facecolor=face, hatch=hatch, edgecolor=HATCH, label="parked")
    if "lost" in states:
        yield Line2D([], [], color=INK, marker="X", ms=8, ls="", label="lost")
    if series.preemptions:
        yield Line2D([], [], color=PREEMPTED, marker="|", ms=9, mew=1.5, ls="", label="preemption")
