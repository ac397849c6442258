"""Prints progress, the first answers and a table of figures to standard error."""

import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm  # type: ignore[import-untyped]

from mellmpi.files import visible, visible_lines
from mellmpi.frontend import Answered, Counts

WIDTH = 100
STDERR = 2
PATIENCE_MS = 1000  # longest wait for a full pipe; later writes do not wait until it has room
PIPE_BYTES = 4096  # a pipe that has room takes so many without blocking (PIPE_BUF, pipe(7))


class StandardError:
    """Standard error as a text file that never raises errors and blocks for PATIENCE_MS at most.

    Text is dropped if standard error is closed, or is a full pipe without a reader.
    """

    def __init__(self, descriptor: int = STDERR):
        self.encoding = getattr(sys.stderr, "encoding", None) or "ascii"
        self._descriptor = descriptor
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._is_stuck = False

    def write(self, text: str) -> int:
        if not self.encoding.lower().startswith("utf"):
            text = text.replace("…", "...").replace("–", "-")
        data = memoryview(text.encode(self.encoding, "backslashreplace"))
        while data and self._can_take():
            try:
                data = data[os.write(self._descriptor, data[:PIPE_BYTES]) :]
            except OSError:
                break
        return len(text)

    def _can_take(self) -> bool:
        self._is_stuck = not self._poll.poll(0 if self._is_stuck else PATIENCE_MS)
        return not self._is_stuck

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


@dataclass
class ShownAnswer:
    """An answer that is shown while it is generated."""

    answer: Answered  # custom_id and prompt
    pending: str = ""  # text that is not printed yet
    is_begun: bool = False
    is_ended: bool = False


class Terminal:
    """Progress and figures on standard error, so that answers can go to standard output."""

    def __init__(self, quiet: bool, show: int):
        """
        quiet  answers go to the terminal: print no progress between them
        show   number of answers to show while they are generated
        """
        self._stream = cast(IO[str], StandardError())  # rich and tqdm use only the methods it has
        # Text of users is printed as rich's Text: in a str, rich would interpret markup and emoji.
        self._console = Console(file=self._stream, width=WIDTH)
        self._quiet = quiet
        self._show = 0 if quiet else show
        self._shown: dict[int, ShownAnswer] = {}  # by line number; only the first one is printed
        self._bar: Any = None
        self._num_tokens = 0

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        self._console.print(Text(f"mellmpi: {visible(what)} …", style="dim"))
        yield

    @contextmanager
    def progress(self, num_lines: int | None, counts: Counts) -> Iterator[Callable[[int], None]]:
        """Show a progress bar. Yields a function to call with the number of new tokens.

        num_lines  of the input; None: unknown
        """
        self._counts = counts
        with tqdm(
            total=num_lines,
            unit=" req",
            ncols=WIDTH,
            mininterval=0.5,
            desc="requests",
            file=self._stream,
            disable=self._quiet,
        ) as self._bar:
            yield self._advance
            self._show_counts()

    @property
    def shows(self) -> bool:
        """Whether answers are shown while they are generated."""
        return self._show > 0

    def show_text(self, answer: Answered) -> None:
        """Print new text of an answer: the first answers only, one after the other."""
        if answer.number not in self._shown:
            if self._show == 0:
                return
            self._show -= 1
            self._shown[answer.number] = ShownAnswer(answer)
        shown = self._shown[answer.number]
        shown.pending += answer.text
        if next(iter(self._shown)) == answer.number:
            self._write(shown)

    def _write(self, shown: ShownAnswer) -> None:
        if not shown.is_begun:
            shown.is_begun = True
            self._bar.clear()
            title = Text(visible(_short(shown.answer.custom_id or "", WIDTH)), style="dim")
            prompt = Text(visible_lines(_short(shown.answer.prompt, 200)), style="bold")
            self._console.print(title, prompt, sep="\n")
        self._stream.write(visible_lines(shown.pending))
        shown.pending = ""

    def _end_shown(self, number: int) -> None:
        """End an answer, and print the pending text of the next ones."""
        if number in self._shown:
            self._shown[number].is_ended = True
        while self._shown and (first := next(iter(self._shown.values()))).is_ended:
            self._write(first)
            self._stream.write("\n\n")
            del self._shown[first.answer.number]
        if self._shown:
            self._write(first)

    def _advance(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        if self._num_tokens % 16 < num_tokens:
            self._bar.set_postfix_str(f"{self._num_tokens} tokens", refresh=False)
            self._show_counts()

    def _show_counts(self) -> None:
        if self._shown:
            return  # the bar would be drawn into an answer
        self._bar.update(self._counts.lines - self._bar.n)

    def answered(self, answer: Answered) -> None:
        """End an answer; print its error if it failed."""
        if self._quiet:
            return
        self._end_shown(answer.number)
        if answer.error is not None:
            self._print(Text(f"failed: {visible(_short(answer.error, 500))}", style="red"))

    def say(self, text: str) -> None:
        """Print lines, with escapes for unsafe characters."""
        self._console.print(Text(visible_lines(text)), soft_wrap=True)

    def _print(self, what: Any) -> None:
        self._bar.clear()
        self._console.print(what)

    def summary(self, report: dict[str, Any], written: list[tuple[str, str]]) -> None:
        """Print the main figures, and the names of the files: (kind, name)."""
        table = Table(title="mellmpi run", show_header=False, width=WIDTH)
        for name, value in summary_rows(report):
            table.add_row(name, value)
        self._console.print(table)
        for what, name in written:
            self.say(f"{what}: {visible(name)}")


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the summary: (name, value)."""
    lines, moves = report["lines"], report["migrations"]
    active, total = report["gpu_seconds_active"], report["gpu_seconds_total"]
    saved = f" ({100 * (1 - active / total):.0f} % saved)" if total else ""
    return [
        (
            "requests",
            f"{lines['completed']} completed, {lines['failed']} failed, "
            f"{lines['skipped']} done before",
        ),
        ("tokens", f"{report['prompt_tokens']} in, {report['output_tokens']} out"),
        ("wall time", f"{report['wall_s']:.1f} s, {report['output_throughput']:.1f} tokens/s"),
        ("worker-seconds", f"{active:.1f} active of {total:.1f}{saved}"),
        (
            "active workers",
            f"{report['active_workers_mean']:.2f} on average, "
            f"{report['active_workers_peak']} at most",
        ),
        (
            "migrations",
            f"{moves['transfer']} by transfer, {moves['recompute']} by recompute, "
            f"{moves['split']} by both, {moves['failed']} aborted; "
            f"{report['migrated_bytes'] / 1e6:.1f} MB",
        ),
        ("preemptions", str(report["preemptions"])),
        ("time to first token", _percentiles(report["ttft_ms"])),
        ("time per output token", _percentiles(report["tpot_ms"])),
        ("pause of a migration", _percentiles(report["downtime_ms"])),
        ("workers lost", str(report["workers_lost"])),
    ]


def _percentiles(ms: dict[str, float | None]) -> str:
    if ms["p50"] is None or ms["p99"] is None:
        return "–"
    return f"{ms['p50']:.0f} ms median, {ms['p99']:.0f} ms p99"


def _short(text: str, limit: int) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit].rstrip() + " …"
