"""The plot of a simulation: GPUs and their lower bound, utilisation, migrations, frontier."""

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from mellmpi.files import visible
from mellmpi.sim.bound import Load
from mellmpi.sim.replay import Tally, sample_times

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BIN_S = 60.0
MOVED, OVER = "migrated_bytes_per_kv_byte", "gpus_over_bound"


def draw(suffix: str, load: Load, report: dict[str, Any], tallies: dict[str, Tally]) -> bytes:
    """Return the picture, in the format that `suffix` names, such as .png."""
    figure, ((gpus, use), (moves, frontier)) = plt.subplots(2, 2, figsize=(14, 9))
    colors = {name: f"C{i}" for i, name in enumerate(tallies)}
    for name, tally in tallies.items():
        _over_time(gpus, use, moves, load, name, tally, colors[name])
    times_s = sample_times(load)
    gpus.fill_between(times_s, load.bound, color="0.8", lw=0, label="lower bound")
    for axes, title, label in (
        (gpus, "GPUs that hold a request", "GPUs"),
        (use, "Utilisation of these GPUs (mean of a minute)", "% of their KV memory"),
        (moves, "Migrations (mean of a minute)", "per second"),
    ):
        axes.set(title=title, ylabel=label, xlabel="seconds since the first arrival")
        axes.set_xlim(0, max(times_s[-1], 1))
        axes.grid(alpha=0.3)
    gpus.set_ylim(bottom=0)
    gpus.yaxis.get_major_locator().set_params(integer=True)
    moves.set_ylim(bottom=0)
    _frontier(frontier, report, colors)
    gpus.legend(fontsize=8, ncols=2)
    figure.suptitle(_title(report), parse_math=False)
    figure.tight_layout()
    picture = BytesIO()
    figure.savefig(picture, format=suffix.lower().removeprefix("."), dpi=110)
    plt.close(figure)
    return picture.getvalue()


def _over_time(
    gpus: Axes, use: Axes, moves: Axes, load: Load, name: str, tally: Tally, color: str
) -> None:
    times_s, held = sample_times(load), np.array(tally.gpus)
    gpus.plot(times_s, held, color=color, lw=0.9, label=name)
    share = _smooth(np.array(tally.used_bytes)) / _smooth(np.maximum(1, held) * load.capacity)
    use.plot(times_s, 100 * share, color=color, lw=1.2)
    if tally.moves:
        at = np.array([t for t, _ in tally.moves]) - load.arrivals[0] / load.rate
        # Whole minutes only: a partial last one would look like a drop.
        edges = np.arange(0, max(times_s[-1] // BIN_S, 1) * BIN_S + 1, BIN_S)
        counts, _ = np.histogram(at, edges)
        moves.stairs(counts / BIN_S, edges, color=color, lw=1.2)


def _frontier(axes: Axes, report: dict[str, Any], colors: dict[str, str]) -> None:
    swept = report.get("frontier", [])
    if swept:
        color = colors.get("frugal", "gray")
        axes.plot(
            [f[MOVED] for f in swept],
            [f[OVER] for f in swept],
            ".-",
            color=color,
            lw=1.2,
            label="frugal, --thrift",
        )
        for point in swept:
            axes.annotate(
                f"{point['thrift']:g}",
                (point[MOVED], point[OVER]),
                fontsize=7,
                color=color,
                xytext=(0, -10),
                textcoords="offset points",
                ha="center",
            )
    for name, f in report["policies"].items():
        axes.plot(f[MOVED], f[OVER], "o", ms=7, color=colors[name], label=name)
    axes.axhline(1, color="black", lw=1.2)
    axes.set(
        title="Frontier: the lower left is better",
        ylabel="mean GPUs / mean lower bound",
        xlabel="bytes moved per byte of KV",
    )
    axes.set_xlim(left=-0.03 * max(axes.get_xlim()[1], 1e-3))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _title(report: dict[str, Any]) -> str:
    config = report["config"]
    how = "ideal" if config["ideal"] else config["cost_from"] or config["profile"]
    faster = f" ×{config['rate_scale']:g}" if config["rate_scale"] != 1 else ""
    title = (
        f"{Path(report['trace']).name}{faster}, {report['requests']} requests, "
        f"{report['gpu_kv_bytes'] / 2**30:g} GiB of KV a GPU, {how}"
    )
    return visible(title)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean of the minute around each sample."""
    width = min(len(values), 120)
    weights = np.convolve(np.ones(len(values)), np.ones(width), "same")
    return np.asarray(np.convolve(values, np.ones(width), "same") / weights)
