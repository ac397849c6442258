"""Command line, environment and YAML file, made into one Config. Only reader of the environment."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from mellmpi import __version__
from mellmpi.cli.flags import BATCH, SERVING, SHORT, SIMULATE, Flag
from mellmpi.config import (
    DEMO_KV_BYTES,
    BatchConfig,
    CacheConfig,
    ClusterConfig,
    Config,
    ModelConfig,
    Options,
    TransportConfig,
    UsageError,
)

SECTIONS = {
    "cache": CacheConfig,
    "batch": BatchConfig,
    "cluster": ClusterConfig,
    "transport": TransportConfig,
}
STDERR = 2
AT_ONCE_MS = 1e6  # of a step in a batch whose requests are all there: only tokens limit it
EXAMPLES = """examples:
  mpirun -np 3 python -m mellmpi                              the demo: a small model, 2 workers
  mpirun -np 3 python -m mellmpi run-batch -i in.jsonl -o out.jsonl --model DIR
  mpirun -np 3 python -m mellmpi run-batch --replay trace.csv --model DIR --report figures.json
  cat in.jsonl | mpirun -np 3 python -m mellmpi > out.jsonl   requests from a pipe
Every flag can also stand in a YAML file (--config), or in the environment as MELLMPI_FLAG_NAME;
the command line beats the environment, which beats the file."""


def _add(parser: argparse.ArgumentParser, flags: Sequence[Flag]) -> None:
    for flag in flags:
        names = [*([SHORT[flag.name]] if flag.name in SHORT else []), f"--{flag.name}"]
        common: dict[str, Any] = {"help": flag.help, "default": argparse.SUPPRESS}
        if flag.is_switch:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        elif flag.is_list:
            parser.add_argument(
                *names, action="append", type=_typed(flag), metavar=flag.metavar, **common
            )
        else:
            parser.add_argument(
                *names, type=_typed(flag), metavar=flag.metavar, choices=flag.choices, **common
            )


def _typed(flag: Flag) -> Callable[[str], Any]:
    """The reader of a flag, whose ValueError becomes argparse's message, which names the flag."""

    def read(text: str) -> Any:
        try:
            return flag.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting: under MPI only rank 0 may speak, and all must end."""

    def error(self, message: str) -> Any:
        if message.startswith("argument COMMAND"):
            message += "; write the command first, then its flags"
        raise UsageError(f"{message}\n  {self.prog} --help shows what there is")


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="python -m mellmpi",
        description="Serve LLMs on as few GPUs as hold the load.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mellmpi {__version__}")
    config = {"metavar": "FILE.yaml", "default": argparse.SUPPRESS, "help": "flags as YAML keys"}
    parser.add_argument("--config", **config)
    _add(parser, (*SERVING, *BATCH))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    doctor = commands.add_parser("doctor", help="what ranks, MPI, GPUs and links are like")
    doctor.add_argument("--config", **config)
    _add(doctor, SERVING)
    demo = commands.add_parser("demo", help="a small model answers prompts that ship with it")
    demo.add_argument("--config", **config)
    _add(demo, (*SERVING, *BATCH))
    batch = commands.add_parser("run-batch", help="answer a file of requests")
    batch.add_argument("--config", **config)
    _add(batch, (*SERVING, *BATCH))
    simulated = commands.add_parser("simulate", help="compare policies on a trace, without GPUs")
    _add(simulated, SIMULATE)
    return parser


def _simulate(arguments: Sequence[str]) -> int:
    """The command that needs neither MPI nor torch."""
    from mellmpi.sim import SimulateOptions, simulate

    try:
        given = vars(make_parser().parse_args(list(arguments)))
        if given.pop("command") != arguments[0]:
            raise UsageError("write the command first: python -m mellmpi simulate --trace FILE …")
        code = simulate(SimulateOptions(**given))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as of `| head`; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
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

    from mellmpi.workload import open_filled

    try:
        with open_filled(Path(name)) as file:
            entries = yaml.safe_load(file.read().decode("utf-8-sig")) or {}
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--config {name} is not UTF-8 text; type  iconv -f LATIN1 -t UTF-8 "
            f"{name} > config.yaml  and give that"
        ) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"--config {name} cannot be read: {why}") from error
    flags = {flag.name: flag for flag in (*SERVING, *BATCH)}
    if not isinstance(entries, dict) or (unknown := entries.keys() - flags.keys()):
        wrong = ", ".join(sorted(map(str, unknown))) if isinstance(entries, dict) else "no mapping"
        raise UsageError(f"--config {name}: {wrong}: keys are the names of flags, without dashes")
    given = {k: v if isinstance(v, list) else [v] for k, v in entries.items() if v is not None}
    text = {k: ";".join(map(str, v)) for k, v in given.items()}
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
    if command == "demo":
        values = {"kv_cache_memory_bytes": DEMO_KV_BYTES, **values}
    if command == "run-batch" and not {"request_rate", "replay"} & values.keys():
        values = {"target_step_ms": AT_ONCE_MS, **values}  # nobody waits for the next token
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
        raise ValueError(
            f"{len(models)} --model and {len(names)} --served-model-name: give each "
            "model one, or none of them"
        )
    pairs = zip(models, names, strict=True)
    return tuple(ModelConfig(model=m, served_model_name=name, **common) for m, name in pairs)


def world_problem(environment: Mapping[str, str], size: int) -> str:
    """Why this world of `size` ranks cannot be what was asked for; empty if it can.

    Rank and size come from MPI alone; this only finds launchers that MPI did not hear of.
    """
    if size > 1:
        return ""
    if _number(environment, "SLURM_STEP_NUM_TASKS") > 1:
        return (
            "srun started several tasks, but MPI sees a world of one rank each. Type\n"
            "  srun --mpi=pmix python -m mellmpi …\n"
            "or, inside the allocation,  mpirun python -m mellmpi …"
        )
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MPI_LOCALNRANKS"):
        if _number(environment, variable) > 1:
            return (
                f"mpirun started {environment[variable]} ranks, but mpi4py sees a world of one: "
                "it uses another MPI than this mpirun. Use the mpirun of the environment that "
                "mpi4py is installed in, or  MELLMPI_MPI=system bash launch/quickstart.sh"
            )
    return ""


def _number(environment: Mapping[str, str], variable: str) -> int:
    """A variable that a launcher sets; 1 where it is no number."""
    value = environment.get(variable, "1")
    return int(value) if value.isdecimal() else 1


def is_first(environment: Mapping[str, str]) -> bool:
    """May this process speak for all that the launcher started? For messages only."""
    ranks = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
    return all(environment.get(variable, "0") == "0" for variable in ranks)


def _open_closed_streams() -> None:
    """Put /dev/null in the place of standard streams that are closed.

    Another file would get their number, and what is meant for standard error with it. `sys.stdin`
    and `sys.stdout` stay None, so that answers are not written to nowhere.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(STDERR, "w", closefd=False)  # noqa: SIM115


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of every rank; the exit code."""
    _open_closed_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    first = is_first(os.environ)
    if {"-h", "--help", "--version"} & set(arguments):
        return _help(arguments) if first else 0
    command = _command(arguments)
    if command == "simulate":
        return _simulate(arguments) if first else 0
    from mellmpi.runtime.ending import run_job

    play = _doctor if command == "doctor" else _serve
    return run_job(
        lambda job: play(job, arguments), lambda size: world_problem(os.environ, size), first
    )


def _command(arguments: Sequence[str]) -> str | None:
    """The command among arguments, wherever it stands, also where its flags are wrong."""
    found = argparse.Namespace(command=None)
    with suppress(UsageError):  # said by the one that reads the options
        make_parser().parse_args(list(arguments), found)
    return found.command


def _serve(job: Any, arguments: Sequence[str]) -> int:
    from mellmpi.runtime.launch import launch

    return launch(job, lambda piped: read_options(arguments, os.environ, piped))


def _doctor(job: Any, arguments: Sequence[str]) -> int:
    from mellmpi.runtime.doctor import doctor

    return doctor(read_options(arguments, os.environ, lambda: False).config, job)


def _help(arguments: Sequence[str]) -> int:
    try:
        make_parser().parse_args(list(arguments))
    except SystemExit as done:
        return int(done.code or 0)
    except UsageError as error:
        sys.stderr.write(f"mellmpi: {error}\n")
    return 2
