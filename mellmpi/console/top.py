"""`top`: the job in the terminal, drawn again with every snapshot until q or Ctrl-C."""

import os
import select
import sys
import termios
import threading
import tty
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mellmpi.config import UsageError
from mellmpi.console.client import Server, ServerProblem
from mellmpi.console.drawing import draw, plain

SPARKS = 20  # snapshots of the sparkline
RETRY_S = 1.0  # between two attempts to reach a server that went away
ONCE_WIDTH = 120  # cells, where standard output is no terminal
QUIT = frozenset(b"qQ\x03\x04")  # also Ctrl-C and Ctrl-D


def top(server: Server, once: bool, output: IO[str] | None = None) -> int:
    """Draw until the user ends it; once if standard output is no terminal. The exit code."""
    output = output or cast(IO[str], sys.stdout)
    first = server.snapshot()  # raises where there is no server
    width = None if output.isatty() else ONCE_WIDTH
    utf = (getattr(output, "encoding", None) or "").lower().startswith("utf")
    file = output if utf else cast(IO[str], PlainText(output))
    console = Console(file=file, width=width, highlight=False)
    if once or not output.isatty():
        rates = [first["rates"]["output_tokens_per_s"]]
        console.print(draw(first, rates, console.width, None))
        return 0
    with suppress(KeyboardInterrupt), _keys() as keys:
        _watch(server, first, console, keys)
    return 0


class PlainText:
    """A text file that takes ASCII only; has the methods that rich uses."""

    def __init__(self, output: IO[str]):
        self.encoding, self.isatty, self.flush = "ascii", output.isatty, output.flush
        self._output = output

    def write(self, text: str) -> int:
        return self._output.write(plain(text))


@contextmanager
def _keys() -> Iterator[int | None]:
    """Descriptor of standard input, read key by key; None if it is no terminal."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield None
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class Newest:
    """The newest snapshot, read by a thread; `descriptor` is readable when there is a new one."""

    def __init__(self, server: Server):
        self.snapshot: dict[str, Any] | None = None
        self.problem = ""  # why there is none at present
        self.refusal: UsageError | None = None  # the end
        self.descriptor, self._write = os.pipe()
        self._server, self._stopped = server, threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while not self._stopped.is_set():
            try:
                for snapshot in self._server.snapshots():
                    self._tell(snapshot, "")
                self._tell(self.snapshot, "the server has ended the stream")
            except ServerProblem as problem:
                self._tell(self.snapshot, str(problem))
            except UsageError as error:
                self._refused(error)
            self._stopped.wait(RETRY_S)

    def _refused(self, error: UsageError) -> None:
        if isinstance(error.__cause__, ConnectionRefusedError):  # it may come back
            self._tell(self.snapshot, f"{self._server.url} is gone; waiting for it")
        else:
            self.refusal = error
            self._tell(None, "")

    def _tell(self, snapshot: dict[str, Any] | None, problem: str) -> None:
        self.snapshot, self.problem = snapshot, problem
        os.write(self._write, b".")

    def stop(self) -> None:
        self._stopped.set()


def _watch(server: Server, first: dict[str, Any], console: Console, keys: int | None) -> None:
    newest, snapshot = Newest(server), first
    rates = deque([first["rates"]["output_tokens_per_s"]], SPARKS)
    watched = [newest.descriptor] if keys is None else [newest.descriptor, keys]
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            screen = draw(snapshot, list(rates), console.width, console.height - 1)
            live.update(_with_problem(screen, newest.problem), refresh=True)
            ready, _, _ = select.select(watched, [], [])
            if keys is not None and keys in ready and set(os.read(keys, 64)) & QUIT:
                newest.stop()
                return
            if newest.descriptor in ready:
                os.read(newest.descriptor, 4096)
                if newest.refusal is not None:
                    raise newest.refusal
                if newest.snapshot is not None and newest.snapshot is not snapshot:
                    snapshot = newest.snapshot
                    rates.append(snapshot["rates"]["output_tokens_per_s"])


def _with_problem(screen: Any, problem: str) -> Any:
    if problem:
        screen.renderables[0] = Text(problem, style="red", no_wrap=True, overflow="ellipsis")
    return screen
