"""What a person sees of a run: progress, the first answers, a table of figures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from mellmpi.front.batch import Answered, Counts
from mellmpi.options import Options

WIDTH = 100


class Terminal:
    """Progress and figures go to standard error, so that answers may go to standard output."""

    def __init__(self, quiet: bool, show: int):
        self._console = Console(stderr=True, width=WIDTH)
        self._quiet = quiet  # answers themselves go to standard output: add nothing to them
        self._left_to_show = show
        self._bar: Any = None
        self._num_tokens = 0

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        self._console.print(Text(f"mellmpi: {what} …", style="dim"))
        yield

    @contextmanager
    def progress(self, num_lines: int | None, counts: Counts) -> Iterator[Callable[[int], None]]:
        """A bar over the lines of the input; call what it yields with every new token count."""
        self._counts = counts
        with tqdm(total=num_lines, unit=" req", ncols=WIDTH, mininterval=0.5, desc="requests",
                  disable=self._quiet) as self._bar:  # fmt: skip
            yield self._advance
            self._show_counts()

    def _advance(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        if self._num_tokens % 16 < num_tokens:
            self._bar.set_postfix_str(f"{self._num_tokens} tokens", refresh=False)
            self._show_counts()

    def _show_counts(self) -> None:
        counts = self._counts
        self._bar.update(counts.completed + counts.failed + counts.skipped - self._bar.n)

    def answered(self, answer: Answered) -> None:
        """One line of the input is done; the first few, and every failure, are shown."""
        if self._quiet:
            return
        if answer.error is not None:
            self._print(Text(f"failed: {answer.error}", style="red"))
        elif self._left_to_show > 0:
            self._left_to_show -= 1
            question = Text(f"{_short(answer.prompt, 200)}\n", style="bold")
            self._print(Panel(question + Text(_short(answer.text, 500)), title=answer.custom_id))

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def _print(self, what: Any) -> None:
        self._bar.clear()
        self._console.print(what)

    def summary(self, report: dict[str, Any], options: Options) -> None:
        """The figures people look at first, and where the rest is."""
        table = Table(title="mellmpi run", show_header=False, width=WIDTH)
        for name, value in summary_rows(report):
            table.add_row(name, value)
        self._console.print(table)
        for what, name in (("answers", options.output_file), ("figures", options.report),
                           ("picture", options.timeline)):  # fmt: skip
            if name and name != "-":
                self._console.print(f"{what}: {name}", highlight=False, soft_wrap=True)


def summary_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) as they are printed."""
    lines, moves = report["lines"], report["migrations"]
    active, total = report["gpu_seconds_active"], report["gpu_seconds_total"]
    saved = f" ({100 * (1 - active / total):.0f} % saved)" if total else ""
    return [
        ("requests", f"{lines['completed']} completed, {lines['failed']} failed, "
                     f"{lines['skipped']} done before"),
        ("tokens", f"{report['prompt_tokens']} in, {report['output_tokens']} out"),
        ("wall time", f"{report['wall_s']:.1f} s, {report['output_throughput']:.1f} tokens/s"),
        ("worker-seconds", f"{active:.1f} active of {total:.1f}{saved}"),
        ("active workers", f"{report['active_workers_mean']:.2f} on average, "
                           f"{report['active_workers_peak']} at most"),
        ("migrations", f"{moves['transfer']} by transfer, {moves['recompute']} by recompute, "
                       f"{moves['split']} by both, {moves['failed']} given up; "
                       f"{report['migrated_bytes'] / 1e6:.1f} MB"),
        ("preemptions", str(report["preemptions"])),
        ("time to first token", _percentiles(report["ttft_ms"])),
        ("time per output token", _percentiles(report["tpot_ms"])),
        ("pause of a migration", _percentiles(report["downtime_ms"])),
        ("workers lost", str(report["workers_lost"])),
    ]  # fmt: skip


def _percentiles(ms: dict[str, float | None]) -> str:
    if ms["p50"] is None or ms["p99"] is None:
        return "–"
    return f"{ms['p50']:.0f} ms median, {ms['p99']:.0f} ms p99"


def _short(text: str, limit: int) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit].rstrip() + " …"
