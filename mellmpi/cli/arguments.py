"""The argparse parser: commands, groups of flags, help."""

import argparse
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from mellmpi import __version__
from mellmpi.cli.bench_flags import BENCH_SERVE, EXAMPLES_OF_BENCH, TEXT_OF_BENCH
from mellmpi.cli.flags import BATCH, SERVING, SHORT, TRACE, Flag, Group
from mellmpi.cli.http_flags import HTTP
from mellmpi.cli.operator_flags import OPERATOR
from mellmpi.cli.simulate_flags import SIMULATE
from mellmpi.cli.values import NUMBER
from mellmpi.config import UsageError
from mellmpi.keys import SCOPES, SERVE

EXAMPLES = """examples:
  mpirun -np 3 python -m mellmpi serve --model DIR            an OpenAI server with 2 workers
  mpirun -np 3 python -m mellmpi demo                         a small model answers prompts
  mpirun -np 3 python -m mellmpi run-batch -i in.jsonl -o out.jsonl --model DIR
  mpirun -np 3 python -m mellmpi run-batch --replay trace.csv --model DIR --report figures.json
  python -m mellmpi bench serve --base-url http://host:8000   measure a server under load
  cat in.jsonl | mpirun -np 3 python -m mellmpi > out.jsonl   requests from a pipe
  python -m mellmpi top                                       watch the server on this host
Every flag can also be set in a YAML file (--config), or in the environment as MELLMPI_FLAG_NAME;
the command line overrides the environment, which overrides the file."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of a flag's help."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [part for line in text.splitlines() for part in textwrap.wrap(line, width)]


class _Parser(argparse.ArgumentParser):
    """Raises UsageError instead of exiting: only rank 0 prints, and every rank must end."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument COMMAND"):
            message += "; write the command first, then its flags"
        raise UsageError(f"{message}\n  {self.prog} --help shows what there is")


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="python -m mellmpi",
        description="Serve LLMs on as few GPUs as hold the load.",
        epilog=EXAMPLES,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"mellmpi {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", parser_class=_Parser
    )
    _add_config(parser)
    _add(parser, (*SERVING, HTTP, *BATCH))
    for name, help, groups in (
        ("doctor", "describe ranks, MPI, GPUs and links", SERVING),
        ("serve", "answer requests over HTTP, as OpenAI's API does", (*SERVING, HTTP, TRACE)),
        ("demo", "a small model answers prompts that ship with it", (*SERVING, *BATCH)),
        ("run-batch", "answer a file of requests", (*SERVING, *BATCH)),
    ):
        command = commands.add_parser(name, help=help, formatter_class=_Help)
        _add_config(command)
        _add(command, groups)
    simulated = commands.add_parser(
        "simulate", help="compare policies on a trace, without GPUs", formatter_class=_Help
    )
    _add(simulated, SIMULATE)
    _add_bench(commands)
    for name, operated in OPERATOR.items():
        command = commands.add_parser(name, help=operated.help, formatter_class=_Help)
        for flag in operated.positions:
            command.add_argument(flag.key, help=flag.help, **_reading(flag, flag.name.upper()))
        _add(command, operated.groups)
    _add_key(commands)
    return parser


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure a server under load", formatter_class=_Help)
    kinds = bench.add_subparsers(
        title="commands", dest="bench", metavar="COMMAND", parser_class=_Parser, required=True
    )
    serve = kinds.add_parser(
        "serve",
        help="send requests to any OpenAI server",
        description=TEXT_OF_BENCH,
        epilog=EXAMPLES_OF_BENCH,
        formatter_class=_Help,
    )
    _add(serve, BENCH_SERVE)


def _add_key(commands: Any) -> None:
    key = commands.add_parser(
        "key",
        help="make an API key: prints the key, and the line for --api-key-file",
        formatter_class=_Help,
    )
    key.add_argument("name", metavar="NAME", help="whose key it is; shown in the access log")
    meanings = "\n".join(f"{name}: {meaning}" for name, meaning in SCOPES.items())
    key.add_argument(
        "--scope",
        action="append",
        choices=tuple(SCOPES),
        help=f"what it is for; may be repeated (default: {SERVE})\n{meanings}",
    )
    key.add_argument(
        "--max-concurrency",
        type=NUMBER,
        default=0,
        metavar="N",
        help="most requests in progress at once, in each API server (default: no limit)",
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE.yaml", default=argparse.SUPPRESS, help="flags as YAML keys"
    )


def _add(parser: argparse.ArgumentParser, groups: Iterable[Group]) -> None:
    for group in groups:
        section = parser.add_argument_group(group.title)
        for flag in group.flags:
            names = [*([SHORT[flag.name]] if flag.name in SHORT else []), f"--{flag.name}"]
            section.add_argument(
                *names, help=flag.help, default=argparse.SUPPRESS, **_reading(flag)
            )


def _reading(flag: Flag, metavar: str | None = None) -> dict[str, Any]:
    """Arguments of `add_argument` that say how values are read."""
    if flag.is_switch:
        return {"action": argparse.BooleanOptionalAction}
    read = {"type": _typed(flag), "metavar": flag.metavar or metavar}
    if flag.takes_several:
        return read | {"nargs": "+", "action": "extend"}
    return read | ({"action": "append"} if flag.is_list else {"choices": flag.choices})


def _typed(flag: Flag) -> Callable[[str], object]:
    """The flag's reader; its ValueError becomes argparse's message, which names the flag."""

    def read(text: str) -> object:
        try:
            return flag.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read
