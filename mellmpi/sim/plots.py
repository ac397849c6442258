"""One picture of a simulation: GPUs against the bound, utilisation, moves, the frontier."""

from typing import Any

import matplotlib
import numpy as np

from mellmpi.sim.bound import Load
from mellmpi.sim.replay import Tally, sample_times

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BIN_S = 60.0


def draw(path: str, load: Load, report: dict[str, Any], tallies: dict[str, Tally]) -> None:
    """Write the picture; the ending of `path` says in which format."""
    figure, ((gpus, use), (moves, frontier)) = plt.subplots(2, 2, figsize=(13, 8))
    times_s, capacity = sample_times(load), load.capacity
    start_s = load.arrivals[0] / load.rate
    gpus.plot(times_s, load.bound, color="black", lw=1, label="lower bound")
    for i, (name, tally) in enumerate(tallies.items()):
        color, held = f"C{i}", np.array(tally.gpus)
        gpus.plot(times_s, held, color=color, lw=0.9, label=name)
        share = np.array(tally.used_bytes) / np.maximum(1, held * capacity)
        use.plot(times_s, 100 * _smooth(share), color=color, lw=1, label=name)
        at = np.array([t - start_s for t, _ in tally.moves])
        counts, edges = np.histogram(at, np.arange(0, times_s[-1] + 2 * BIN_S, BIN_S))
        moves.step(edges[:-1], counts / BIN_S, where="post", color=color, lw=1, label=name)
        f = report["policies"][name]
        frontier.plot(f["migrated_bytes_per_kv_byte"], f["gpus_over_bound"], "o", color=color)
        frontier.annotate(name, (f["migrated_bytes_per_kv_byte"], f["gpus_over_bound"]),
                          xytext=(6, 4), textcoords="offset points")  # fmt: skip
    for axes, title, label in ((gpus, "GPUs that hold a request", "GPUs"),
                               (use, "Utilisation (mean of a minute)", "% of KV memory"),
                               (moves, "Migrations", "1/s")):  # fmt: skip
        axes.set(title=title, ylabel=label, xlabel="seconds since the first arrival")
        axes.grid(alpha=0.3)
    frontier.set(title="Frontier: lower left is better", ylabel="mean GPUs / mean bound",
                 xlabel="bytes moved per byte of KV")  # fmt: skip
    frontier.grid(alpha=0.3)
    gpus.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smooth(values: np.ndarray) -> np.ndarray:
    width = min(len(values), 120)
    weights = np.convolve(np.ones(len(values)), np.ones(width), "same")
    return np.asarray(np.convolve(values, np.ones(width), "same") / weights)
