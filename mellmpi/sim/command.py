"""The command `simulate`: one trace, several policies, figures as JSON, a table and plots."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mellmpi.config import UsageError
from mellmpi.costs import CostModel
from mellmpi.frontend import Destination, Unwritable, check_different, visible
from mellmpi.protocol import ModelKv
from mellmpi.scheduler.policies import POLICIES
from mellmpi.sim.bound import Load, make_load, mean_context_bytes
from mellmpi.sim.profiles import (
    BLOCK_SIZE,
    LIMITS,
    MODELS,
    PROFILES,
    cost_from,
    cost_of,
)
from mellmpi.sim.replay import IdealReplay, Replay, Settings, Tally, Unserved, figures
from mellmpi.sim.timed import TimedReplay
from mellmpi.workload import load

PICTURES = (".png", ".pdf", ".svg", ".jpg")
THRIFTS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of a frontier


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What to simulate."""

    trace: str = ""
    rate_scale: float = 1.0
    model: dict[str, str] | None = None  # known models, by their names in the trace; "": all
    kv_bytes_per_token: dict[str, int] | None = None  # likewise
    hosts: list[tuple[str, ...]] | None = None  # models of GPU 1, 2, … and so on from the first
    gpu_kv_gib: float = 0.0
    policies: str = ",".join(POLICIES)
    ideal: bool = False
    decode_rate: float = 30.0  # tokens a second of every request, if ideal
    profile: str = "A100-40G"  # what things take, if not
    cost_from: str | None = None  # report of a run, in place of a profile
    tick_s: float = 0.25
    gpus: int | None = None  # None: as many as any policy asks for
    thrift: float = 0.5
    seed: int = 0
    json: str | None = None
    plot: str | None = None
    frontier: bool = False

    def __post_init__(self) -> None:
        if not self.trace:
            raise ValueError("simulate needs --trace FILE")
        if (self.model is None) == (self.kv_bytes_per_token is None):
            raise ValueError("simulate needs one of --model and --kv-bytes-per-token")
        for model in (self.model or {}).values():
            if model not in MODELS:
                raise ValueError(
                    f"--model must be one of {', '.join(MODELS)}, not {model}; "
                    "give others by --kv-bytes-per-token"
                )
        if not self.gpu_kv_gib:
            raise ValueError("simulate needs --gpu-kv-gib G")
        self._check_hosts()
        self._check_picture()
        if unknown := [name for name in self.names if name not in POLICIES]:
            raise ValueError(
                f"--policies: {', '.join(unknown)} is not one of {', '.join(POLICIES)}"
            )
        if self.profile not in PROFILES:
            raise ValueError(f"--profile must be one of {', '.join(PROFILES)}, not {self.profile}")
        if not (self.ideal or self.model or self.cost_from):
            raise ValueError(
                "what steps take depends on the model: give a known one by --model, "
                "or --cost-from REPORT, or add --ideal"
            )

    def _check_picture(self) -> None:
        if self.plot is not None and Path(self.plot).suffix.lower() not in PICTURES:
            raise ValueError(
                f"--plot {visible(self.plot)}: its name must end with the kind of "
                f"picture, one of {' '.join(PICTURES)}"
            )

    def _check_hosts(self) -> None:
        hosted = {model for models in self.hosts or [] for model in models}
        if self.hosts is None:
            return
        if unknown := sorted(hosted - self.token_bytes.keys()):
            raise ValueError(f"--hosts: {unknown[0]!r} is none of {', '.join(self.token_bytes)}")
        if missing := sorted(self.token_bytes.keys() - hosted):
            raise ValueError(f"--hosts: no GPU hosts {missing[0]!r}")
        if self.gpus is not None and self.gpus < len(self.hosts):
            raise ValueError(f"--hosts names {len(self.hosts)} GPUs, but --gpus is {self.gpus}")

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.policies.split(",")]

    @property
    def token_bytes(self) -> dict[str, int]:
        """KV of one position, by model."""
        if self.kv_bytes_per_token is not None:
            return self.kv_bytes_per_token
        return {name: MODELS[model].token_bytes for name, model in (self.model or {}).items()}

    def cost(self, context_bytes: float) -> CostModel:
        """What things take, if not nothing. Of several models, those of the largest count."""
        if self.cost_from is not None:
            return cost_from(self.cost_from)
        shapes = [MODELS[model] for model in (self.model or {}).values()]
        largest = max(shapes, key=lambda shape: shape.parameters)
        return cost_of(PROFILES[self.profile], largest, context_bytes)


@dataclass(frozen=True)
class Scene:
    """What all policies have before them."""

    load: Load
    kvs: dict[str, ModelKv]
    cost: CostModel | None  # None: nothing takes time
    source: str  # of the trace, for people


def read_scene(options: SimulateOptions) -> Scene:
    """Load and cost model. ValueError names the file and the line, or what to type instead."""
    workload = load(options.trace).faster(options.rate_scale)
    sizes, capacity = options.token_bytes, int(options.gpu_kv_gib * 2**30)
    if options.ideal:
        kvs = {name: ModelKv(name, 1, size) for name, size in sizes.items()}
        return Scene(
            make_load(workload, sizes, capacity, options.decode_rate), kvs, None, workload.source
        )
    cost = options.cost(mean_context_bytes(workload, sizes))
    kvs = _in_blocks(sizes)
    alone = 1 / cost.forward_s(0, 1)  # tokens/s of a request with a GPU for itself
    block_sizes = {name: kv.block_size for name, kv in kvs.items()}
    return Scene(
        make_load(workload, sizes, capacity, alone, block_sizes), kvs, cost, workload.source
    )


def _in_blocks(sizes: dict[str, int]) -> dict[str, ModelKv]:
    """Blocks of equal bytes for all models, of at least `BLOCK_SIZE` tokens. ValueError if odd."""
    one = math.lcm(*sizes.values())
    block_bytes = one * -(-BLOCK_SIZE * max(sizes.values()) // one)
    if block_bytes > 64 * BLOCK_SIZE * max(sizes.values()):
        raise ValueError(
            "models of one cluster share blocks: one size of --kv-bytes-per-token "
            "must be a multiple of the others, or nearly so"
        )
    return {name: ModelKv(name, block_bytes // size, block_bytes) for name, size in sizes.items()}


def simulate(options: SimulateOptions) -> int:
    """Run all policies and write what was asked for; the exit code."""
    figures_file, picture = _outputs(options)
    try:
        scene = read_scene(options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    sys.stderr.write(f"mellmpi: {visible(scene.source)}\n")
    trace = scene.load
    runs = {name: _run(scene, name, options) for name in dict.fromkeys(options.names)}
    report = {
        "trace": options.trace,
        "gpu_kv_bytes": trace.capacity,
        "requests": len(trace.arrivals),
        "dropped": trace.dropped,
        "lower_bound": {"mean": float(trace.bound.mean()), "peak": int(trace.bound.max())},
        "policies": {name: found for name, (_, found) in runs.items()},
        "config": asdict(options),
        "cost": asdict(scene.cost) if scene.cost else None,
        "commit": _commit(),
    }
    if options.frontier:
        report["frontier"] = _frontier(scene, options)
    if figures_file:
        _write(figures_file, (json.dumps(report, indent=2) + "\n").encode())
    if picture:
        tallies = {name: tally for name, (tally, _) in runs.items()}
        _write(picture, _drawn(picture, trace, report, tallies))
    sys.stdout.write(_table(report))
    return 0


def _frontier(scene: Scene, options: SimulateOptions) -> list[dict[str, Any]]:
    """The figures of `frugal` from fewest bytes to fewest GPUs."""
    found = []
    for thrift in THRIFTS:
        _, swept = _run(scene, "frugal", replace(options, thrift=thrift))
        found.append({"thrift": thrift} | swept)
    return found


def _run(scene: Scene, name: str, options: SimulateOptions) -> tuple[Tally, dict[str, Any]]:
    """With as many workers as it takes, if no number was given."""
    trace, kinds = scene.load, options.hosts or [tuple(scene.kvs)]
    num = options.gpus or len(kinds) * min(trace.peak_live, 2 * int(trace.bound.max()) + 16)
    settings = Settings(
        options.thrift,
        options.tick_s,
        options.seed,
        time.perf_counter,
        may_lack=options.gpus is not None,
    )
    began_s = time.perf_counter()
    with _progress(name, len(trace.arrivals)) as progress:
        while True:
            hosts = [tuple(scene.kvs[m] for m in kinds[i % len(kinds)]) for i in range(num)]
            try:
                tally = _replay(scene, name, hosts, settings).run(progress)
            except Unserved:
                num *= 2
                continue
            return tally, figures(trace, tally, time.perf_counter() - began_s) | {"gpus": num}


def _replay(
    scene: Scene, name: str, hosts: list[tuple[ModelKv, ...]], settings: Settings
) -> Replay:
    if scene.cost is None:
        return IdealReplay(scene.load, name, hosts, settings)
    return TimedReplay(scene.load, name, hosts, scene.cost, LIMITS, settings)


class _progress:
    """A bar on a terminal, where tqdm is installed; else nothing."""

    def __init__(self, name: str, total: int):
        self.name, self.total, self.bar = name, total, None

    def __enter__(self) -> Callable[[int], None]:
        if not sys.stderr.isatty():
            return lambda done: None
        try:
            from tqdm import tqdm
        except ImportError:
            return lambda done: None
        self.bar = bar = tqdm(total=self.total, desc=self.name, unit=" requests")
        return lambda done: bar.update(done - bar.n) and None

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _outputs(options: SimulateOptions) -> tuple[Destination | None, Destination | None]:
    """Where figures and picture go, proved before a long run.

    UsageError where one cannot be written, or would overwrite an input or the other one.
    """
    if options.plot and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'mellmpi[sim]'")
    given = (("--json", options.json), ("--plot", options.plot))
    figures_file, picture = (
        Destination(flag, name, name) if name else None for flag, name in given
    )
    inputs = [("--trace", options.trace), ("--cost-from", options.cost_from)]
    found = [_status(flag, name) for flag, name in inputs if name]
    with ExitStack() as made:
        for one in filter(None, (figures_file, picture)):
            found.append((str(one), one.prove(made)))
            _check_space(one)
        check_different(found)
    return figures_file, picture


def _check_space(proved: Destination) -> None:
    """UsageError for a device that takes no bytes, such as /dev/full."""
    try:
        if proved.descriptor is not None:
            os.write(proved.descriptor, b"")
    except OSError as error:
        raise UsageError(f"{proved} cannot be written: {error.strerror}") from error


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
    picture: Destination, trace: Load, report: dict[str, Any], tallies: dict[str, Tally]
) -> bytes:
    from mellmpi.sim.plots import draw  # matplotlib is slow to import

    return draw(Path(picture.name).suffix, trace, report, tallies)


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
