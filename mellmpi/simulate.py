"""The command `simulate`: one trace, several policies, figures as JSON, a table and plots."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mellmpi.config import UsageError
from mellmpi.core.policies import POLICIES
from mellmpi.sim.bound import Load, make_load
from mellmpi.sim.replay import IdealReplay, Tally, Unserved, figures
from mellmpi.workload import load

FP16 = 2  # bytes
MODELS = {  # layers, KV heads, head size: from the config.json of each
    "llama-2-7b": (32, 32, 128), "llama-2-13b": (40, 40, 128), "llama-2-70b": (80, 8, 128),
    "llama-3-8b": (32, 8, 128), "llama-3-70b": (80, 8, 128), "mistral-7b": (32, 8, 128),
    "mixtral-8x7b": (32, 8, 128), "qwen2.5-7b": (28, 4, 128), "qwen2.5-14b": (48, 8, 128),
    "qwen2.5-32b": (64, 8, 128), "opt-13b": (40, 40, 128),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SimulateOptions:
    """What to simulate."""

    trace: str = ""
    rate_scale: float = 1.0
    model: str | None = None
    kv_bytes_per_token: dict[str, int] | None = None  # by model; "" for one that fits all
    gpu_kv_gib: float = 0.0
    policies: str = ",".join(POLICIES)
    ideal: bool = False
    decode_rate: float = 30.0  # tokens a second of every request
    tick_s: float = 0.25
    gpus: int | None = None  # None: as many as any policy asks for
    thrift: float = 0.5
    seed: int = 0
    json: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        if not self.trace:
            raise ValueError("simulate needs --trace FILE")
        if (self.model is None) == (self.kv_bytes_per_token is None):
            raise ValueError("simulate needs one of --model and --kv-bytes-per-token")
        if self.model is not None and self.model not in MODELS:
            raise ValueError(f"--model must be one of {', '.join(MODELS)}, not {self.model}; "
                             "give others by --kv-bytes-per-token")  # fmt: skip
        sizes = (("--kv-bytes-per-token", size) for size in self.token_bytes.values())
        for flag, value in (("--gpu-kv-gib", self.gpu_kv_gib), ("--decode-rate", self.decode_rate),
                            ("--tick-s", self.tick_s), ("--rate-scale", self.rate_scale),
                            *sizes):  # fmt: skip
            if not 0 < value < float("inf"):
                raise ValueError(f"{flag} must be given, and over 0")
        if self.gpus is not None and self.gpus < 1:
            raise ValueError(f"--gpus must be at least 1, not {self.gpus}")
        if not 0 <= self.thrift <= 1:
            raise ValueError(f"--thrift must be in [0, 1], not {self.thrift}")
        if unknown := [name for name in self.names if name not in POLICIES]:
            raise ValueError(f"--policies: {', '.join(unknown)} is not one of "
                             f"{', '.join(POLICIES)}")  # fmt: skip
        if not self.ideal:
            raise ValueError("only the idealised model can be simulated yet: add --ideal")

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.policies.split(",")]

    @property
    def token_bytes(self) -> dict[str, int]:
        """KV of one position, by model."""
        if self.kv_bytes_per_token is not None:
            return self.kv_bytes_per_token
        layers, heads, size = MODELS[self.model or ""]
        return {"": 2 * layers * heads * size * FP16}  # keys and values


def simulate(options: SimulateOptions) -> int:
    """Run all policies and write what was asked for; the exit code."""
    try:
        workload = load(options.trace).faster(options.rate_scale)
        capacity = int(options.gpu_kv_gib * 2**30)
        trace = make_load(workload, options.token_bytes, capacity, options.decode_rate)
    except ValueError as error:
        raise UsageError(str(error)) from error
    runs = {name: _run(trace, name, options) for name in dict.fromkeys(options.names)}
    report = {
        "trace": options.trace, "gpu_kv_bytes": trace.capacity, "requests": len(trace.arrivals),
        "dropped": trace.dropped,
        "lower_bound": {"mean": float(trace.bound.mean()), "peak": int(trace.bound.max())},
        "policies": {name: found for name, (_, found) in runs.items()},
        "config": asdict(options), "commit": _commit(),
    }  # fmt: skip
    _write(options, trace, report, {name: tally for name, (tally, _) in runs.items()})
    sys.stdout.write(_table(report))
    return 0


def _run(trace: Load, name: str, options: SimulateOptions) -> tuple[Tally, dict[str, Any]]:
    """With as many workers as it takes, if no number was given."""
    num = options.gpus or min(trace.peak_live, 2 * int(trace.bound.max()) + 16)
    began_s = time.perf_counter()
    with _progress(name, len(trace.arrivals)) as progress:
        while True:
            replay = IdealReplay(
                trace, name, num, thrift=options.thrift, tick_s=options.tick_s, seed=options.seed,
                clock=time.perf_counter, may_lack=options.gpus is not None,
            )  # fmt: skip
            try:
                tally = replay.run(progress)
            except Unserved:
                num *= 2
                continue
            return tally, figures(trace, tally, time.perf_counter() - began_s) | {"gpus": num}


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


def _write(options: SimulateOptions, trace: Load, report: dict[str, Any],
           tallies: dict[str, Tally]) -> None:  # fmt: skip
    try:
        if options.json:
            Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        if options.plot:
            from mellmpi.sim.plots import draw

            draw(options.plot, trace, report, tallies)
    except ImportError as error:
        raise UsageError("--plot needs matplotlib: pip install 'mellmpi[sim]'") from error
    except OSError as error:
        raise UsageError(f"cannot write {error.filename}: {error.strerror}") from error


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
