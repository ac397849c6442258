"""What a person sees of a run: progress, the first answers, a table of figures."""

import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from mellmpi.frontend import Answered, Counts, visible, visible_lines

WIDTH = 100
STDERR = 2
PATIENCE_MS = 1000  # so long a full pipe is waited for, once
PIPE_BYTES = 4096  # so many never block where a pipe can take any (PIPE_BUF, pipe(7))


class StandardError:
    """Standard error as a text file that never raises, and never waits for its reader for long.

    Text is dropped where standard error is closed, or a full pipe that nobody reads.
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
        """Nothing is held back."""

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)


@dataclass
class Growing:
    """An answer that is shown while it grows."""

    of: Answered
    unseen: str = ""  # text that is not shown yet
    is_begun: bool = False
    is_ended: bool = False


class Terminal:
    """Progress and figures go to standard error, so that answers may go to standard output."""

    def __init__(self, quiet: bool, show: int):
        self._stream: Any = StandardError()
        # What users wrote is printed as Text alone: in a str, rich looks for markup and emoji.
        self._console = Console(file=self._stream, width=WIDTH)
        self._quiet = quiet  # answers themselves go to standard output: add nothing to them
        self._show = 0 if quiet else show  # answers
        self._growing: dict[int, Growing] = {}  # by line: those that are shown, the first one now
        self._bar: Any = None
        self._num_tokens = 0

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        self._console.print(Text(f"mellmpi: {visible(what)} …", style="dim"))
        yield

    @contextmanager
    def progress(self, num_lines: int | None, counts: Counts) -> Iterator[Callable[[int], None]]:
        """A bar over the lines of the input; call what it yields with every new token count."""
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
        """Some answers are shown while they grow."""
        return self._show > 0

    def grew(self, answer: Answered) -> None:
        """Show the first answers as they grow: one at a time, the others when it has ended."""
        if answer.number not in self._growing:
            if self._show == 0:
                return
            self._show -= 1
            self._growing[answer.number] = Growing(answer)
        growing = self._growing[answer.number]
        growing.unseen += answer.text
        if next(iter(self._growing)) == answer.number:
            self._write(growing)

    def _write(self, growing: "Growing") -> None:
        if not growing.is_begun:
            growing.is_begun = True
            self._bar.clear()
            title = Text(visible(_short(growing.of.custom_id or "", WIDTH)), style="dim")
            question = Text(visible_lines(_short(growing.of.prompt, 200)), style="bold")
            self._console.print(title, question, sep="\n")
        self._stream.write(visible_lines(growing.unseen))
        growing.unseen = ""

    def _end_growing(self, number: int) -> None:
        """An answer has ended: it is followed by those that have grown meanwhile."""
        if number in self._growing:
            self._growing[number].is_ended = True
        while self._growing and (first := next(iter(self._growing.values()))).is_ended:
            self._write(first)
            self._stream.write("\n\n")
            del self._growing[first.of.number]
        if self._growing:
            self._write(first)

    def _advance(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        if self._num_tokens % 16 < num_tokens:
            self._bar.set_postfix_str(f"{self._num_tokens} tokens", refresh=False)
            self._show_counts()

    def _show_counts(self) -> None:
        if self._growing:
            return  # a bar would be drawn into the middle of a sentence
        self._bar.update(self._counts.lines - self._bar.n)

    def answered(self, answer: Answered) -> None:
        """One line of the input is done; failures are shown."""
        if self._quiet:
            return
        self._end_growing(answer.number)
        if answer.error is not None:
            self._print(Text(f"failed: {visible(_short(answer.error, 500))}", style="red"))

    def say(self, text: str) -> None:
        """A line, or several, as they are but for what a terminal would act upon."""
        self._console.print(Text(visible_lines(text)), soft_wrap=True)

    def _print(self, what: Any) -> None:
        self._bar.clear()
        self._console.print(what)

    def summary(self, report: dict[str, Any], written: list[tuple[str, str]]) -> None:
        """The figures people look at first, and where the rest is: (what, name of the file)."""
        table = Table(title="mellmpi run", show_header=False, width=WIDTH)
        for name, value in summary_rows(report):
            table.add_row(name, value)
        self._console.print(table)
        for what, name in written:
            self.say(f"{what}: {visible(name)}")


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) as they are printed."""
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
            f"{moves['split']} by both, {moves['failed']} given up; "
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
