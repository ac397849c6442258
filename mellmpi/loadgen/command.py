"""The command `bench serve`: dataset, server, run, then banner, JSON and picture."""

import asyncio
import errno
import gc
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mellmpi.config import UsageError
from mellmpi.files import Destination, Unwritable, check_different, visible
from mellmpi.loadgen.arrivals import arrival_times
from mellmpi.loadgen.banner import banner
from mellmpi.loadgen.datasets import Dataset, read_dataset
from mellmpi.loadgen.figures import detailed, failures, figures, lag_warning
from mellmpi.loadgen.made_up import Vocabulary
from mellmpi.loadgen.options import BenchOptions
from mellmpi.loadgen.run import Run

INTERRUPTED = 130  # exit code, as a shell gives after Ctrl-C


@dataclass(frozen=True)
class Measured:
    """A run with what it was made of."""

    run: Run
    model: str
    tokenizer: str | None
    num_prompts: int


def bench_serve(options: BenchOptions) -> int:
    """Send the requests, and write the requested outputs.

    Returns the exit code: 0, 1 if no request was answered, 130 after an interrupt. UsageError says
    what to type instead.
    """
    if find_spec("aiohttp") is None:
        raise UsageError("bench serve needs aiohttp: pip install 'mellmpi[bench]'")
    began = datetime.now()
    picture = _picture(options)
    if options.save_result:
        _make_result_directory(options)
    name = _tokenizer_name(options)
    try:
        vocabulary = Vocabulary.load(name) if name else None
        dataset = read_dataset(options, vocabulary)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if dataset.source:
        _say(visible(dataset.source))
    measured = _measure(options, dataset, vocabulary, name)
    found = figures(measured.run, options.goodput, options.metric_percentiles)
    sys.stdout.write(banner(found, options))
    sys.stdout.flush()
    _remark(measured.run, found)
    if options.save_result:
        _save(options, measured, found, began)
    if picture:
        _draw(picture, options, measured, found)
    if measured.run.is_interrupted:
        return INTERRUPTED
    return 0 if found["completed"] else 1


def _measure(
    options: BenchOptions, dataset: Dataset, vocabulary: Vocabulary | None, tokenizer: str | None
) -> Measured:
    from mellmpi.loadgen.session import Session  # needs aiohttp

    arrival_s = dataset.arrival_s
    if arrival_s is None:
        number = len(dataset.prompts)
        arrival_s = arrival_times(number, options.request_rate, options.burstiness, options.seed)
    _allow_connections()
    session = Session(options, dataset.prompts, arrival_s, vocabulary, _say)

    gc.collect()
    gc.freeze()  # a collection during the run need not look at the prompts

    async def interruptible() -> Run:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        with Progress(len(dataset.prompts), options) as on_change:
            return await session.run(stop, on_change)

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        run = runner.run(interruptible())
    gc.unfreeze()
    return Measured(run, session.model, tokenizer, len(dataset.prompts))


def _tokenizer_name(options: BenchOptions) -> str | None:
    """Return --tokenizer, else --model if that is a directory with a tokenizer."""
    if options.tokenizer or not options.model:
        return options.tokenizer
    return options.model if (Path(options.model) / "tokenizer.json").exists() else None


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return the faster event loop where it is installed."""
    if find_spec("uvloop") is None:
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _allow_connections() -> None:
    """Let the process open as many connections as the system allows: one for each request."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


# --- terminal ------------------------------------------------------------------------------------


class Progress:
    """A progress bar on a terminal, if tqdm is installed."""

    def __init__(self, total: int, options: BenchOptions):
        self._bar: Any = None
        self._failed = 0
        if not options.disable_tqdm and sys.stderr.isatty() and find_spec("tqdm"):
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=total, unit=" requests", file=sys.stderr)

    def __enter__(self) -> Callable[[Run], None]:
        return self._show if self._bar else lambda run: None

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.close()

    def _show(self, run: Run) -> None:
        new = run.outcomes[self._bar.n :]
        self._failed += sum(bool(outcome.reason) for outcome in new)
        failed = f", {self._failed:,} failed" if self._failed else ""
        self._bar.set_postfix_str(f"{run.in_flight:,} in flight{failed}", refresh=False)
        self._bar.update(len(new))


def _say(line: str) -> None:
    sys.stderr.write(f"mellmpi: {line}\n")


def _remark(run: Run, found: dict[str, Any]) -> None:
    """Say what the figures alone do not."""
    if run.is_interrupted:
        _say("interrupted; the figures are of the requests that had ended")
    if found["tokens_counted_by"].get("chunks"):
        _say(
            "the server reports no usage, so each chunk of a stream counts as one token; "
            "--tokenizer DIR counts exactly"
        )
    for line in filter(None, (failures(run.outcomes), lag_warning(run))):
        _say(visible(line))


# --- files ---------------------------------------------------------------------------------------


def _picture(options: BenchOptions) -> Destination | None:
    """Return the destination of the picture, proved writable before a long run."""
    if options.plot is None:
        return None
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'mellmpi[bench]'")
    picture = Destination("--plot", options.plot, options.plot)
    with ExitStack() as created:
        found = [(str(picture), picture.check_writable(created))]
        if options.dataset_path and Path(options.dataset_path).exists():
            name = f"--dataset-path {visible(options.dataset_path)}"
            found.append((name, os.stat(options.dataset_path)))
        check_different(found)
    return picture


def _make_result_directory(options: BenchOptions) -> None:
    """Make the directory of the result before a long run. UsageError if it cannot be written to."""
    directory = Path(options.result_dir or "", options.result_filename or "x").parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UsageError(
            f"--result-dir: {visible(str(directory))} cannot be written: {error.strerror}"
        ) from error


def _draw(
    picture: Destination, options: BenchOptions, measured: Measured, found: dict[str, Any]
) -> None:
    from mellmpi.loadgen.plot import draw  # matplotlib is slow to import

    title = visible(f"{measured.model} at {options.server}, {options.dataset_name}")
    suffix = Path(picture.name).suffix
    _write(picture, draw(measured.run, found, title, suffix))


def _save(
    options: BenchOptions, measured: Measured, found: dict[str, Any], began: datetime
) -> None:
    date = began.strftime("%Y%m%d-%H%M%S")
    rate = _finite(options.request_rate)
    result = {
        "date": date,
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": options.label,
        "model_id": measured.model,
        "tokenizer_id": measured.tokenizer,
        "num_prompts": measured.num_prompts,
        **dict(options.metadata),
        "request_rate": rate,
        "burstiness": _finite(options.burstiness),
        "max_concurrency": options.max_concurrency,
        **found,
        **(detailed(measured.run) if options.save_detailed else {}),
    }
    most = f"-concurrency{options.max_concurrency}" if options.max_concurrency else ""
    model = measured.model.rstrip("/").rpartition("/")[2]
    default = f"{options.label or options.backend}-{rate}qps{most}-{model}-{date}.json"
    path = Path(options.result_dir or "", options.result_filename or default)
    _write(
        Destination("--result-filename", str(path), str(path)), json.dumps(result).encode() + b"\n"
    )
    _say(f"figures: {visible(str(path))}")


def _finite(value: float) -> float | str:
    """Return the number, or "inf", which JSON has no number for."""
    return value if math.isfinite(value) else "inf"


def _write(destination: Destination, data: bytes) -> None:
    try:
        destination.replace(data)
    except Unwritable as error:
        raise UsageError(str(error)) from error
