"""The commands that see and operate a running server, with their flags and positions."""

from dataclasses import dataclass

from mellmpi.cli.flags import Flag, Group
from mellmpi.cli.values import COUNT, NUMBER, switch

LEVELS = ("debug", "info", "warning", "error")
SERVER = Group(
    "server",
    (
        Flag("url", str, "of the server (default: http://127.0.0.1:8000)", "URL"),
        Flag("api-key", str, "key of the server, if it needs one", "KEY"),
    ),
)
ONCE = "print once, and end (default: where standard output is no terminal)"
DRAWING = Group("drawing", (Flag("once", switch, ONCE, is_switch=True),))
WORKER = Flag("worker", COUNT, "number of the worker, as `top` shows it")
REQUEST = Flag("request", NUMBER, "number of the request, as `top` shows it")
LEVEL = Flag("level", str, ", ".join(LEVELS), choices=LEVELS)


@dataclass(frozen=True)
class OperatorCommand:
    """A command that a running server carries out, or that shows it."""

    help: str
    positions: tuple[Flag, ...] = ()  # arguments without dashes
    groups: tuple[Group, ...] = (SERVER,)


OPERATOR = {
    "top": OperatorCommand("watch a running server in the terminal", groups=(SERVER, DRAWING)),
    "drain": OperatorCommand("move all requests away from a worker, and park it", (WORKER,)),
    "undrain": OperatorCommand("let a drained worker take requests again", (WORKER,)),
    "migrate": OperatorCommand("move one request to another worker", (REQUEST, WORKER)),
    "loglevel": OperatorCommand("set how much a running server logs", (LEVEL,)),
}
