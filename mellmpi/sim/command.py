"""The command `simulate`: one trace, several policies, figures as JSON, a table and plots."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mellmpi.config import UsageError
from mellmpi.files import Destination, Unwritable, check_different, visible
from mellmpi.protocol import ModelKv
from mellmpi.sim.bound import Load
from mellmpi.sim.options import SimulateOptions
from mellmpi.sim.profiles import LIMITS
from mellmpi.sim.replay import IdealReplay, Replay, Settings, Tally, Unserved, figures
from mellmpi.sim.scenario import Scenario, read_scenario
from mellmpi.sim.timed import TimedReplay

THRIFTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of a frontier


def simulate(options: SimulateOptions) -> int:
    """Run all policies and write the requested outputs. Returns the exit code."""
    figures_file, picture = _outputs(options)
    try:
        scenario = read_scenario(options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    sys.stderr.write(f"mellmpi: {visible(scenario.source)}\n")
    load = scenario.load
    runs = {name: _run(scenario, name, options) for name in dict.fromkeys(options.names)}
    report = {
        "trace": options.trace,
        "gpu_kv_bytes": load.capacity,
        "requests": len(load.arrivals),
        "dropped": load.dropped,
        "lower_bound": {"mean": float(load.bound.mean()), "peak": int(load.bound.max())},
        "policies": {name: found for name, (_, found) in runs.items()},
        "config": asdict(options),
        "cost": asdict(scenario.cost) if scenario.cost else None,
        "commit": _commit(),
    }
    if options.frontier:
        report["frontier"] = _frontier(scenario, options)
    if figures_file:
        _write(figures_file, (json.dumps(report, indent=2) + "\n").encode())
    if picture:
        tallies = {name: tally for name, (tally, _) in runs.items()}
        _write(picture, _drawn(picture, load, report, tallies))
    sys.stdout.write(_table(report))
    return 0


# --- runs ----------------------------------------------------------------------------------------


def _frontier(scenario: Scenario, options: SimulateOptions) -> list[dict[str, float]]:
    """Return the figures of `frugal` for each thrift, from fewest bytes moved to fewest GPUs."""
    found = []
    for thrift in THRIFTS:
        _, swept = _run(scenario, "frugal", replace(options, thrift=thrift))
        found.append({"thrift": thrift} | swept)
    return found


def _run(scenario: Scenario, name: str, options: SimulateOptions) -> tuple[Tally, dict[str, float]]:
    """Run one policy; without `--gpus`, with twice as many workers until all requests run."""
    load, kinds = scenario.load, options.hosts or [tuple(scenario.kvs)]
    num = options.gpus or len(kinds) * min(load.peak_live, 2 * int(load.bound.max()) + 16)
    settings = Settings(
        options.thrift,
        options.tick_s,
        options.seed,
        time.perf_counter,
        may_lack=options.gpus is not None,
    )
    began_s = time.perf_counter()
    with ExitStack() as stack:
        progress = _progress_bar(name, len(load.arrivals), stack)
        while True:
            hosts = [tuple(scenario.kvs[m] for m in kinds[i % len(kinds)]) for i in range(num)]
            try:
                tally = _replay(scenario, name, hosts, settings).run(progress)
            except Unserved:
                num *= 2
                continue
            return tally, figures(load, tally, time.perf_counter() - began_s) | {"gpus": num}


def _replay(
    scenario: Scenario, name: str, hosts: list[tuple[ModelKv, ...]], settings: Settings
) -> Replay:
    if scenario.cost is None:
        return IdealReplay(scenario.load, name, hosts, settings)
    return TimedReplay(scenario.load, name, hosts, scenario.cost, LIMITS, settings)


def _progress_bar(name: str, total: int, stack: ExitStack) -> Callable[[int], None]:
    """Show a progress bar on a terminal if tqdm is installed. Returns the function to update it."""
    if not sys.stderr.isatty():
        return lambda done: None
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return lambda done: None
    bar = tqdm(total=total, desc=name, unit=" requests")
    stack.callback(bar.close)

    def show(done: int) -> None:
        bar.update(done - bar.n)

    return show


# --- outputs -------------------------------------------------------------------------------------


def _outputs(options: SimulateOptions) -> tuple[Destination | None, Destination | None]:
    """Return the destinations of figures and picture, checked before a long run.

    UsageError if one cannot be written, or would overwrite an input or the other one.
    """
    if options.plot and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'mellmpi[sim]'")
    given = (("--json", options.json), ("--plot", options.plot))
    figures_file, picture = (
        Destination(flag, name, name) if name else None for flag, name in given
    )
    inputs = [("--trace", options.trace), ("--cost-from", options.cost_from)]
    found = [_status(flag, name) for flag, name in inputs if name]
    with ExitStack() as created:
        for destination in filter(None, (figures_file, picture)):
            found.append((str(destination), destination.check_writable(created)))
            _check_space(destination)
        check_different(found)
    return figures_file, picture


def _check_space(destination: Destination) -> None:
    """UsageError for a device that takes no bytes, such as /dev/full."""
    try:
        if destination.descriptor is not None:
            os.write(destination.descriptor, b"")
    except OSError as error:
        raise UsageError(f"{destination} cannot be written: {error.strerror}") from error


def _status(flag: str, name: str) -> tuple[str, os.stat_result]:
    try:
        return f"{flag} {visible(name)}", os.stat(name)
    except OSError as error:
        raise UsageError(f"{flag} {visible(name)} cannot be read: {error.strerror}") from error


def _write(destination: Destination, data: bytes) -> None:
    try:
        destination.replace(data)
    except Unwritable as error:
        raise UsageError(str(error)) from error


def _drawn(
    picture: Destination, load: Load, report: dict[str, Any], tallies: dict[str, Tally]
) -> bytes:
    from mellmpi.sim.plots import draw  # matplotlib is slow to import

    return draw(Path(picture.name).suffix, load, report, tallies)


def _table(report: dict[str, Any]) -> str:
    bound = report["lower_bound"]
    lines = [
        f"{report['requests']} requests ({report['dropped']} dropped), "
        f"lower bound {bound['mean']:.1f} GPUs, peak {bound['peak']}",
        f"{'policy':14}{'GPUs':>8}{'peak':>6}{'/bound':>8}{'use %':>7}{'moves/req':>11}"
        f"{'B/KV B':>8}{'preempt':>9}{'stall s':>9}{'wall s':>8}",
    ]
    for name, f in report["policies"].items():
        lines.append(
            f"{name:14}{f['gpus_mean']:8.2f}{f['gpus_peak']:6d}{f['gpus_over_bound']:8.3f}"
            f"{100 * f['utilization']:7.1f}{f['migrations_per_request']:11.3f}"
            f"{f['migrated_bytes_per_kv_byte']:8.3f}{f['preemptions']:9d}"
            f"{f['stall_mean_s']:9.2f}{f['wall_s']:8.1f}"
        )
    return "\n".join(lines) + "\n"


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
