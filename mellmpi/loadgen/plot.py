"""The picture of a run: distributions of TTFT, TPOT and E2EL, tokens/s over time, load.

Needs matplotlib: import this module only where a picture is wanted.
"""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mellmpi.loadgen.figures import in_flight, samples_s, tokens_per_second
from mellmpi.loadgen.run import Run
from mellmpi.telemetry.pictures import INK, KV_EDGE, KV_FILL, MUTED, RULE, hide_frame

NAMES = {"ttft": "time to first token", "tpot": "time per output token", "e2el": "whole answer"}
MOST_BINS = 200
FAILED_COLOR = "#D55E00"


def draw(run: Run, found: dict[str, Any], title: str, suffix: str) -> bytes:
    """Return the picture, in the format that `suffix` names, such as .png."""
    stream = io.BytesIO()
    figure(run, found, title).savefig(stream, format=suffix[1:].lower(), dpi=150)
    return stream.getvalue()


def figure(run: Run, found: dict[str, Any], title: str) -> Figure:
    """Three distributions above, tokens/s and requests in flight below, on one time axis."""
    fig = Figure(figsize=(12, 7.6), layout="constrained")
    grid = fig.add_gridspec(3, 3, height_ratios=[1.5, 1.2, 0.8])
    done = [outcome for outcome in run.outcomes if not outcome.reason]
    samples = samples_s(done)
    for column, metric in enumerate(NAMES):
        _distribution(fig.add_subplot(grid[0, column]), metric, samples[metric])
    tokens = fig.add_subplot(grid[1, :])
    load = fig.add_subplot(grid[2, :], sharex=tokens)
    _tokens(tokens, run, found)
    _load(load, run)
    tokens.set_xlim(0, max(run.duration_s, 1e-3))
    load.set_xlabel("time since the start of the run, s", color=MUTED, fontsize=9)
    fig.suptitle(
        f"{title}\n{_subtitle(found)}",
        x=0.01,
        ha="left",
        fontsize=11,
        color=INK,
        parse_math=False,
    )
    return fig


def _subtitle(found: dict[str, Any]) -> str:
    parts = [
        f"{found['completed']:,} requests in {found['duration']:.1f} s",
        f"{found['request_throughput']:.3g} requests/s",
        f"{found['output_throughput']:,.0f} output tokens/s",
    ]
    if found["request_goodput"] is not None:
        parts.append(f"goodput {found['request_goodput']:.3g}/s")
    if found["failed"]:
        parts.append(f"{found['failed']:,} failed")
    return "  ·  ".join(parts)


def _distribution(axes: Axes, metric: str, values_s: list[float]) -> None:
    """Draw the share of requests that are at most as slow, with the median and P99."""
    hide_frame(axes)
    axes.set_title(f"{metric.upper()}: {NAMES[metric]}", loc="left", fontsize=10, color=INK)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.5, 0.9, 0.99], ["0", "50 %", "90 %", "99 %"])
    axes.grid(axis="y", color=RULE, lw=0.6)
    if not values_s:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no sample", transform=axes.transAxes, ha="center", color=MUTED)
        return
    ordered = np.sort(values_s)
    scale, unit = (1.0, "s") if ordered[-1] >= 10 else (1000.0, "ms")
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    end = max(1.05 * scale * float(ordered[-1]), 1e-6)
    axes.step(scale * ordered, shares, where="post", color=KV_EDGE, lw=1.6)
    for share, name in ((0.5, "median"), (0.99, "P99")):
        at = scale * float(np.percentile(ordered, 100 * share))
        is_left = at < end / 2
        axes.plot([at], [share], "o", ms=5, color=INK, zorder=4, clip_on=False)
        axes.annotate(
            f"{name} {at:,.3g}",
            (at, share),
            xytext=(6 if is_left else -6, -5),
            textcoords="offset points",
            ha="left" if is_left else "right",
            va="top",
            fontsize=9,
            color=INK,
        )
    axes.set_xlim(0, end)
    axes.set_xlabel(unit, color=MUTED, fontsize=9)


def _tokens(axes: Axes, run: Run, found: dict[str, Any]) -> None:
    hide_frame(axes)
    bin_s = max(1.0, np.ceil(run.duration_s / MOST_BINS)) if run.duration_s > 20 else 0.25
    done = [outcome for outcome in run.outcomes if not outcome.reason]
    rates = tokens_per_second(done, bin_s)
    edges = np.arange(len(rates) + 1) * bin_s
    axes.stairs(rates, edges, fill=True, color=KV_FILL)
    axes.stairs(rates, edges, color=KV_EDGE, lw=0.9)
    axes.axhline(found["output_throughput"], color=INK, lw=0.9, ls=(0, (1, 2)))
    axes.set_title(
        f"output tokens/s, dotted: mean {found['output_throughput']:,.0f}",
        loc="left",
        fontsize=10,
        color=INK,
    )
    axes.set_ylim(bottom=0)
    axes.tick_params(labelbottom=False)


def _load(axes: Axes, run: Run) -> None:
    hide_frame(axes)
    times_s, counts = in_flight(run.outcomes)
    axes.step([0, *times_s], [0, *counts], where="post", color=INK, lw=1.2)
    failed = [outcome.end_s for outcome in run.outcomes if outcome.reason]
    if failed:
        axes.plot(failed, [0] * len(failed), "x", ms=5, color=FAILED_COLOR, clip_on=False, zorder=5)
    crosses = ", crosses: failures" if failed else ""
    axes.set_title(f"requests in flight{crosses}", loc="left", fontsize=10, color=INK)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
