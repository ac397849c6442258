"""Command line, environment and YAML file, made into one Config. Only reader of the environment."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mellmpi import __version__
from mellmpi.config import (
    DTYPES,
    MIGRATE,
    BatchConfig,
    CacheConfig,
    ClusterConfig,
    Config,
    ModelConfig,
    TransportConfig,
    UsageError,
)
from mellmpi.options import Options

SECTIONS = {
    "cache": CacheConfig,
    "batch": BatchConfig,
    "cluster": ClusterConfig,
    "transport": TransportConfig,
}
POLICIES = ("best_fit", "worst_fit", "load_balance", "mell", "frugal")
EXAMPLES = """examples:
  mpirun -np 3 python -m mellmpi                              the demo: a small model, 2 workers
  mpirun -np 3 python -m mellmpi run-batch -i in.jsonl -o out.jsonl --model DIR
  mpirun -np 3 python -m mellmpi run-batch --replay trace.csv --model DIR --report figures.json
  cat in.jsonl | mpirun -np 3 python -m mellmpi > out.jsonl   requests from a pipe
Every flag can also stand in a YAML file (--config), or in the environment as MELLMPI_FLAG_NAME;
the command line beats the environment, which beats the file."""


@dataclass(frozen=True)
class Flag:
    """One option: where its value goes, how it is read, and what it means."""

    name: str  # as typed, without the dashes; also the YAML key
    read: Callable[[str], Any]
    help: str
    metavar: str | None = None
    choices: Sequence[str] | None = None
    is_switch: bool = False
    is_list: bool = False  # may be given several times; in the environment with ; between

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return f"MELLMPI_{self.key.upper()}"


def byte_size(text: str) -> int:
    """A number of bytes, such as 512M, 1.5GiB or 2000000; K, M, G and T are powers of 1024."""
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    factor = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}.get(number[-1:], 1)
    try:
        return int(float(number.rstrip("kmgt")) * factor)
    except ValueError as error:
        raise ValueError(f"{text!r} is no number of bytes (write 512M or 2G)") from error


def sizes_by_model(text: str) -> dict[str, int]:
    """512K for all, or a=512K,b=128K by model."""
    parts = [part.rpartition("=") for part in text.split(",")]
    return {name.strip(): byte_size(size) for name, _, size in parts}


def known_by_model(text: str) -> dict[str, str]:
    """llama-2-7b for all, or chat=llama-2-7b,code=llama-3-8b by the names in a trace."""
    parts = [part.rpartition("=") for part in text.split(",")]
    return {name.strip(): known.strip() for name, _, known in parts}


def hosted(text: str) -> list[tuple[str, ...]]:
    """a,b,a+b: the first GPU hosts a, the second b, the third both."""
    return [tuple(m.strip() for m in models.split("+")) for models in text.split(",")]


def switch(text: str) -> bool:
    """A switch in the environment or a YAML file."""
    known = {"1": True, "true": True, "yes": True, "on": True,
             "0": False, "false": False, "no": False, "off": False}  # fmt: skip
    if text.strip().lower() not in known:
        raise ValueError(f"{text!r} is neither true nor false")
    return known[text.strip().lower()]


SERVING = (
    Flag("model", str, "smollm2 (default), a Hugging Face directory, a .gguf file, a hub name, or "
         "random:CONFIG; several times for several models", "M", is_list=True),
    Flag("served-model-name", str, "the name that requests use (default: as --model); once a "
         "--model", "NAME", is_list=True),
    Flag("worker-models", str, "names, with commas between, of the models that worker 1 hosts; "
         "again for worker 2 …, then over again (default: all host all)", "NAMES", is_list=True),
    Flag("dtype", str, "of weights and KV (default: bfloat16)", choices=DTYPES),
    Flag("max-model-len", int, "prompt + output tokens (default: what model and KV allow)", "N"),
    Flag("chat-template", str, "Jinja file in place of the model's own", "FILE"),
    Flag("block-size", int, "tokens a KV block (default: 16)", "N"),
    Flag("kv-cache-memory-bytes", byte_size, "of each worker, such as 512M (default: a share of "
         "the GPU, 1G on a CPU)", "SIZE"),
    Flag("gpu-memory-utilization", float, "share of a GPU for weights and KV (default: 0.9)", "X"),
    Flag("enable-prefix-caching", switch, "reuse the KV of prompts that begin alike",
         is_switch=True),
    Flag("max-num-seqs", int, "sequences a worker decodes at once (default: 64)", "N"),
    Flag("max-num-batched-tokens", int, "tokens a worker computes in one step (default: 512)", "N"),
    Flag("policy", str, "who goes where (default: frugal)", choices=POLICIES),
    Flag("migrate", str, "never; auto (default): as the policy decides; stress: at random, for "
         "tests", choices=MIGRATE),
    Flag("rebalance-every-s", float, "the policy looks at the whole cluster (default: 0.1)", "S"),
    Flag("thrift", float, "of frugal: 0 moves the fewest bytes, 1 uses the fewest workers "
         "(default: 0.5)", "X"),
    Flag("park-after-s", float, "a worker empty for so long may be parked (default: 1)", "S"),
    Flag("threads", int, "compute threads a worker (default: cores / workers of the host)", "N"),
    Flag("device", str, "auto (default), cpu or cuda", choices=("auto", "cpu", "cuda")),
    Flag("oversubscribe-gpus", switch, "let workers share a GPU", is_switch=True),
    Flag("seed", int, "of random weights and of --migrate stress (default: 0)", "N"),
    Flag("cache-dir", str, "where converted models are kept (default: ~/.cache/mellmpi)", "DIR"),
)  # fmt: skip
BATCH = (
    Flag("input-file", str, "requests, one JSON object a line (OpenAI's batch form); - is a pipe",
         "FILE"),
    Flag("output-file", str, "answers, appended as they complete; a second run skips those it "
         "finds; - is a pipe", "FILE"),
    Flag("request-rate", float, "requests arrive at R a second, Poisson (default: all at once)",
         "R"),
    Flag("replay", str, "in place of -i: arrivals and lengths of a trace (uniform CSV or JSONL, "
         "Azure 2023, BurstGPT, Mooncake; gzipped or not), made-up tokens", "TRACE"),
    Flag("rate-scale", float, "of a replay: requests arrive X times as fast (default: 1)", "X"),
    Flag("length-scale", float, "of a replay: prompts and answers are X times as long (default: 1)",
         "X"),
    Flag("max-requests", int, "of a replay: only the first N (default: all)", "N"),
    Flag("report", str, "write figures of the run as JSON", "FILE"),
    Flag("timeline", str, "draw the run: KV of every worker over time, moves, parked workers",
         "FILE.png"),
    Flag("show", int, "print so many of the first answers (default: 0)", "N"),
)  # fmt: skip
SIMULATE = (
    Flag("trace", str, "arrivals and lengths: uniform CSV or JSONL, Azure 2023, BurstGPT, "
         "Mooncake; gzipped or not", "FILE"),
    Flag("rate-scale", float, "requests arrive X times as fast (default: 1)", "X"),
    Flag("model", known_by_model, "a known model, for sizes and times; or several, by their names "
         "in the trace: chat=llama-2-7b,code=llama-3-8b", "NAME"),
    Flag("kv-bytes-per-token", sizes_by_model, "of any other model, such as 512K; or, by the names "
         "of models in the trace, a=512K,b=128K", "SIZE"),
    Flag("hosts", hosted, "of several models, which GPU hosts what: a,b,a+b for three GPUs, and so "
         "on from the first (default: every GPU hosts all)", "MODELS"),
    Flag("gpu-kv-gib", float, "GiB of KV cache a GPU", "G"),
    Flag("policies", str, "to compare, with commas between", "NAMES"),
    Flag("ideal", switch, "prefill, waking and moves take no time", is_switch=True),
    Flag("decode-rate", float, "tokens/s of every request, with --ideal (default: 30)", "R"),
    Flag("profile", str, "what steps, transfers and waking take, without --ideal: A100-40G "
         "(default), RTX-4090, H100", "GPU"),
    Flag("cost-from", str, "in place of a profile, what a run took: its run-batch --report",
         "REPORT"),
    Flag("tick-s", float, "the policy looks at the whole cluster (default: 0.25)", "S"),
    Flag("gpus", int, "at most so many (default: as many as it takes)", "MAX"),
    Flag("thrift", float, "of frugal (default: 0.5)", "X"),
    Flag("seed", int, "of what is random (default: 0)", "N"),
    Flag("json", str, "write the figures", "OUT"),
    Flag("plot", str, "draw the figures", "OUT.png"),
    Flag("frontier", switch, "run frugal at thrifts from 0 to 1, too", is_switch=True),
)  # fmt: skip
SHORT = {"input-file": "-i", "output-file": "-o"}


def _add(parser: argparse.ArgumentParser, flags: Sequence[Flag]) -> None:
    for flag in flags:
        names = [*([SHORT[flag.name]] if flag.name in SHORT else []), f"--{flag.name}"]
        common: dict[str, Any] = {"help": flag.help, "default": argparse.SUPPRESS}
        if flag.is_switch:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        elif flag.is_list:
            parser.add_argument(
                *names, action="append", type=flag.read, metavar=flag.metavar, **common
            )
        else:
            parser.add_argument(
                *names, type=flag.read, metavar=flag.metavar, choices=flag.choices, **common
            )


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting: under MPI only rank 0 may speak, and all must end."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}\n  {self.prog} --help shows what there is")


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="python -m mellmpi", description="Serve LLMs on as few GPUs as hold the load.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"mellmpi {__version__}")
    config = {"metavar": "FILE.yaml", "default": argparse.SUPPRESS, "help": "flags as YAML keys"}
    parser.add_argument("--config", **config)
    _add(parser, (*SERVING, *BATCH))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    batch = commands.add_parser("run-batch", help="answer a file of requests")
    batch.add_argument("--config", **config)
    _add(batch, (*SERVING, *BATCH))
    simulated = commands.add_parser("simulate", help="compare policies on a trace, without GPUs")
    _add(simulated, SIMULATE)
    return parser


def _simulate(arguments: Sequence[str]) -> int:
    """The command that needs neither MPI nor torch."""
    from mellmpi.simulate import SimulateOptions, simulate

    try:
        given = vars(make_parser().parse_args(list(arguments)))
        given.pop("command")
        return simulate(SimulateOptions(**given))
    except (UsageError, ValueError) as error:
        sys.stderr.write(f"mellmpi: {error}\n")
        return 2


def read_options(
    arguments: Sequence[str], environment: Mapping[str, str], piped: Callable[[], bool]
) -> Options:
    """What to do, from all three sources. UsageError says what to type instead.

    piped  is asked, where no command was given, whether requests come on standard input
    """
    given = vars(make_parser().parse_args(list(arguments)))
    command = given.pop("command", None)
    values = {
        **_from_file(given.pop("config", environment.get("MELLMPI_CONFIG"))),
        **_from_environment(environment),
        **given,
    }
    if command is None and not {"input_file", "replay"} & values.keys():
        command = "pipe" if piped() else "demo"
    try:
        return _options(command or "run-batch", values)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for flag in (*SERVING, *BATCH):
        if flag.variable in environment:
            found[flag.key] = _read(flag, environment[flag.variable], flag.variable)
    return found


def _from_file(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    import yaml

    try:
        entries = yaml.safe_load(Path(name).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"--config {name} cannot be read: {error}") from error
    flags = {flag.name: flag for flag in (*SERVING, *BATCH)}
    if not isinstance(entries, dict) or (unknown := sorted(entries.keys() - flags.keys())):
        wrong = ", ".join(map(str, unknown)) if isinstance(entries, dict) else "no mapping"
        raise UsageError(f"--config {name}: {wrong}: keys are the names of flags, without dashes")
    text = {k: ";".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in entries.items()}
    return {flags[k].key: _read(flags[k], v, f"{name}: {k}") for k, v in text.items()}


def _read(flag: Flag, text: str, source: str) -> Any:
    if flag.is_list:
        return [flag.read(part.strip()) for part in text.split(";")]
    try:
        value = flag.read(text)
    except ValueError as error:
        raise UsageError(f"{source}: {error}") from error
    if flag.choices and value not in flag.choices:
        raise UsageError(f"{source} must be one of {', '.join(flag.choices)}, not {text}")
    return value


def _options(command: str, values: dict[str, Any]) -> Options:
    sections: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        mine = {f.name: values[f.name] for f in fields(section) if f.name in values}
        sections[name] = section(**mine)
    top = {k: values[k] for k in ("threads", "device", "oversubscribe_gpus") if k in values}
    hosted = [tuple(names.split(",")) for names in values.get("worker_models", [])]
    config = Config(models=_models(values), worker_models=tuple(hosted), **sections, **top)
    mine = {f.name: values[f.name] for f in fields(Options) if f.name in values}
    return Options(command=command, config=config, **mine)


def _models(values: dict[str, Any]) -> tuple[ModelConfig, ...]:
    common = {f.name: values[f.name] for f in fields(ModelConfig) if f.name in values}
    models = common.pop("model", [ModelConfig().model])
    names = common.pop("served_model_name", [None] * len(models))
    if len(names) != len(models):
        raise ValueError(f"{len(models)} --model and {len(names)} --served-model-name: give each "
                         "model one, or none of them")  # fmt: skip
    pairs = zip(models, names, strict=True)
    return tuple(ModelConfig(model=m, served_model_name=name, **common) for m, name in pairs)


def world_problem(environment: Mapping[str, str], size: int) -> str:
    """Why this world of `size` ranks cannot be what was asked for; empty if it can.

    Rank and size come from MPI alone; this only finds launchers that MPI did not hear of.
    """
    if size > 1:
        return ""
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return (
            "srun started several tasks, but MPI sees a world of one rank each. Type\n"
            "  srun --mpi=pmix python -m mellmpi …\n"
            "or, inside the allocation,  mpirun python -m mellmpi …"
        )
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MPI_LOCALNRANKS"):
        if int(environment.get(variable, "1")) > 1:
            return (
                f"mpirun started {environment[variable]} ranks, but mpi4py sees a world of one: "
                "it uses another MPI than this mpirun. Use the mpirun of the environment that "
                "mpi4py is installed in, or  MELLMPI_MPI=system bash launch/quickstart.sh"
            )
    return ""


def is_first(environment: Mapping[str, str]) -> bool:
    """May this process speak for all that the launcher started? For messages only."""
    ranks = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
    return all(environment.get(variable, "0") == "0" for variable in ranks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of every rank; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = is_first(os.environ)
    if {"-h", "--help", "--version"} & set(arguments):
        return _help(arguments) if first else 0
    if arguments[:1] == ["simulate"]:
        return _simulate(arguments)
    from mellmpi.runtime.launch import launch  # imports MPI

    return launch(
        lambda piped: read_options(arguments, os.environ, piped),
        lambda size: world_problem(os.environ, size),
        speaks=first,
    )


def _help(arguments: Sequence[str]) -> int:
    try:
        make_parser().parse_args(list(arguments))
    except SystemExit as done:
        return int(done.code or 0)
    except UsageError as error:
        sys.stderr.write(f"mellmpi: {error}\n")
    return 2
