"""The entry point: options from command line, environment and YAML file, then the command."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from mellmpi.cli.arguments import make_parser
from mellmpi.cli.flags import BATCH, SERVING, Flag, flags_of
from mellmpi.cli.http_flags import HTTP
from mellmpi.cli.launcher import is_first, world_problem
from mellmpi.cli.operator_flags import OPERATOR, SERVER
from mellmpi.config import (
    DEMO_KV_BYTES,
    BatchConfig,
    CacheConfig,
    ClusterConfig,
    Config,
    HttpConfig,
    ModelConfig,
    Options,
    TransportConfig,
    UsageError,
)
from mellmpi.keys import SERVE, line_of, new_key

SECTIONS = {
    "cache": CacheConfig,
    "batch": BatchConfig,
    "cluster": ClusterConfig,
    "transport": TransportConfig,
}
STDERR = 2
AT_ONCE_MS = 1e6  # target of a step where no user waits: only --max-num-batched-tokens limits it
FLAGS = tuple(flags_of((*SERVING, HTTP, *BATCH)))  # that the environment and the file may set


def _simulate(given: dict[str, Any]) -> int:
    from mellmpi.sim import SimulateOptions, simulate

    return simulate(SimulateOptions(**given))


def _bench_serve(given: dict[str, Any]) -> int:
    from mellmpi.loadgen import BenchOptions, bench_serve

    return bench_serve(BenchOptions(api_key=os.environ.get("OPENAI_API_KEY"), **given))


def _alone(command: Callable[[dict[str, Any]], int], arguments: Sequence[str]) -> int:
    """Run a command that needs neither MPI nor torch; its exit code."""
    try:
        given = vars(make_parser().parse_args(list(arguments)))
        words = [given.pop(name) for name in ("command", "bench") if name in given]
        if words != list(arguments[: len(words)]):
            raise UsageError(
                f"write the command first: python -m mellmpi {' '.join(words)}, then its flags"
            )
        code = command(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as with `| head`; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, ValueError) as error:
        sys.stderr.write(f"mellmpi: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130


ALONE = {"simulate": _simulate, "bench": _bench_serve}  # commands of one process


def _operate(command: str, arguments: Sequence[str]) -> int:
    """Run a command for a server that runs elsewhere: neither MPI nor torch; its exit code."""
    from mellmpi.console import operate

    try:
        given = vars(make_parser().parse_args(list(arguments)))
        if given.pop("command") != arguments[0]:
            raise UsageError(f"write the command first: python -m mellmpi {command} …")
        return operate(command, {**_from_environment(os.environ, SERVER.flags), **given})
    except UsageError as error:
        sys.stderr.write(f"mellmpi: {error}\n")
        return 2


def _key(arguments: Sequence[str]) -> int:
    """Print a new API key, and its line for --api-key-file; the exit code."""
    try:
        given = make_parser().parse_args(list(arguments))
        key = new_key()
        line = line_of(given.name, key, given.scope or [SERVE], given.max_concurrency)
    except UsageError as error:
        sys.stderr.write(f"mellmpi: {error}\n")
        return 2
    sys.stdout.write(f"{key}\n{line}\n")
    return 0


def read_options(
    arguments: Sequence[str], environment: Mapping[str, str], piped: Callable[[], bool]
) -> Options:
    """Options from all three sources. UsageError says what to type instead.

    piped  tells whether requests come on standard input; called only if no command is given
    """
    given = vars(make_parser().parse_args(list(arguments)))
    command = given.pop("command", None)
    values = {
        **_from_file(given.pop("config", environment.get("MELLMPI_CONFIG"))),
        **_from_environment(environment, FLAGS),
        **given,
    }
    if command is None and not {"input_file", "replay"} & values.keys():
        command = "pipe" if piped() else "serve"
    try:
        return _options(command or "run-batch", values)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _from_environment(environment: Mapping[str, str], flags: Sequence[Flag]) -> dict[str, Any]:
    given = [flag for flag in flags if flag.variable in environment]
    return {flag.key: _read(flag, environment[flag.variable], flag.variable) for flag in given}


def _from_file(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    import yaml  # type: ignore[import-untyped]

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
    flags = {flag.name: flag for flag in FLAGS}
    if isinstance(entries, dict):
        entries = {str(key).replace("_", "-"): value for key, value in entries.items()}
    if not isinstance(entries, dict) or (unknown := entries.keys() - flags.keys()):
        wrong = ", ".join(sorted(map(str, unknown))) if isinstance(entries, dict) else "no mapping"
        raise UsageError(
            f"--config {name}: {wrong}: keys are the names of flags, such as max-num-seqs"
        )
    given = {k: v if isinstance(v, list) else [v] for k, v in entries.items() if v is not None}
    text = {k: ";".join(map(str, v)) for k, v in given.items()}
    return {flags[k].key: _read(flags[k], v, f"{name}: {k}") for k, v in text.items()}


def _read(flag: Flag, text: str, source: str) -> object:
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
        values = {"target_step_ms": AT_ONCE_MS, **values}  # no user waits for the next token
    sections: dict[str, Any] = {
        name: section(**_fields_of(section, values)) for name, section in SECTIONS.items()
    }
    top = {k: values[k] for k in ("threads", "device", "oversubscribe_gpus") if k in values}
    hosted = [tuple(names.split(",")) for names in values.get("worker_models", [])]
    config = Config(models=_models(values), worker_models=tuple(hosted), **sections, **top)
    http = HttpConfig(**_fields_of(HttpConfig, values))
    return Options(command=command, config=config, http=http, **_fields_of(Options, values))


def _fields_of(section: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values that are fields of this dataclass."""
    return {f.name: values[f.name] for f in fields(section) if f.name in values}


def _models(values: dict[str, Any]) -> tuple[ModelConfig, ...]:
    common = _fields_of(ModelConfig, values)
    models = common.pop("model", [ModelConfig().model])
    names = common.pop("served_model_name", [None] * len(models))
    if len(names) != len(models):
        raise ValueError(
            f"{len(models)} --model and {len(names)} --served-model-name: give each "
            "model one, or none of them"
        )
    pairs = zip(models, names, strict=True)
    return tuple(ModelConfig(model=m, served_model_name=name, **common) for m, name in pairs)


def _open_closed_streams() -> None:
    """Open /dev/null in place of each closed standard stream.

    Otherwise the next file opened gets the descriptor, and messages for standard error end up in
    it. `sys.stdin` and `sys.stdout` stay None, so that answers are not written to /dev/null.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(STDERR, "w", closefd=False)  # noqa: SIM115


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of every rank. Returns the exit code."""
    _open_closed_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    first = is_first(os.environ)
    if {"-h", "--help", "--version"} & set(arguments):
        return _help(arguments) if first else 0
    command = _command(arguments)
    if command in ALONE:
        return _alone(ALONE[command], arguments) if first else 0
    if command in OPERATOR:
        return _operate(command, arguments) if first else 0
    if command == "key":
        return _key(arguments) if first else 0
    from mellmpi.runtime.ending import run_job

    if command == "doctor":
        run_rank: Callable[[Any], int] = partial(_doctor, arguments=arguments)
    else:
        run_rank = _launch(arguments, first)
    return run_job(run_rank, lambda size: world_problem(os.environ, size), first)


def _command(arguments: Sequence[str]) -> str | None:
    """The command at any position, also where flags are wrong; None if no command is given."""
    found = argparse.Namespace(command=None)
    with suppress(UsageError):  # raised again where the options are read
        make_parser().parse_args(list(arguments), found)
    command: str | None = found.command
    return command


# `job`: a `mellmpi.runtime.job.Job`, or None without MPI. Commands load `runtime` when they run.


def _launch(arguments: Sequence[str], first: bool) -> Callable[[Any], int]:
    """Begin what the first process does before MPI starts; return the rest, which takes the job."""
    from mellmpi.runtime.begin import Begun

    def read(piped: Callable[[], bool]) -> Options:
        return read_options(arguments, os.environ, piped)

    begun = Begun(read) if first else None

    def run_rank(job: Any) -> int:
        from mellmpi.runtime.launch import launch

        return launch(job, begun, read)

    return run_rank


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
