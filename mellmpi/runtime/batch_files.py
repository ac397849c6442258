"""The files of a job: all are opened, or checked for write access, before the model loads."""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from mellmpi.config import Options, UsageError
from mellmpi.files import (
    Destination,
    Reader,
    Requests,
    Source,
    check_different,
    check_input,
    descriptor_reader,
    is_descriptor,
    open_input,
    requests_in,
    visible,
)
from mellmpi.runtime.standard_input import StandardInput, descriptor_path
from mellmpi.workload import Workload, load

STDIN, STDOUT, STDERR = 0, 1, 2
STDOUT_NAMES = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


@dataclass
class BatchFiles:
    """The inputs and outputs of a job. None: the job has no such file."""

    requests: Requests | None  # None: replays `workload`
    workload: Workload | None
    output: Destination | None
    report: Destination | None
    timeline: Destination | None
    trace: Destination | None
    finished: frozenset[str] = field(default_factory=frozenset)  # custom_ids of an earlier run

    @property
    def is_quiet(self) -> bool:
        """Whether answers go to the terminal, so that progress would be printed between them."""
        if self.output is None or self.output.descriptor is None:
            return False
        return self.output.descriptor == STDOUT or is_descriptor(self.output.path, STDERR)

    @property
    def num_requests(self) -> int | None:
        """Number of requests, for the progress bar; None: unknown."""
        if self.requests is not None:
            return self.requests.count
        return None if self.workload is None else len(self.workload)

    def begin(self) -> Callable[[bytes], None] | None:
        """Open the output. Returns the function that writes answers. Raises UsageError."""
        if self.output is None:
            return None
        self.finished |= self.output.resume()
        return self.output.append


def open_files(options: Options) -> BatchFiles:
    """Open the input, check the outputs, and read the answers of an earlier run.

    Raises UsageError that says what to type instead; then no new file is left.
    """
    is_complete = options.replay or (options.input_file and options.output_file)
    if options.command == "run-batch" and not is_complete:
        raise UsageError(
            "run-batch needs -i requests.jsonl and -o answers.jsonl, or --replay trace.csv"
        )
    output, report = _output(options), _destination("--report", options.report)
    timeline, trace = _timeline(options.timeline), _destination("--trace-out", options.trace_out)
    found = BatchFiles(None, None, output, report, timeline, trace)
    outputs = [file for file in (output, report, timeline, trace) if file]
    if options.replay:
        _check_trace(options.replay, output)
        _check_outputs(f"--replay {visible(options.replay)}", os.stat(options.replay), outputs)
        found.workload = _workload(options)
        sys.stderr.write(f"mellmpi: {found.workload.source}\n")
    else:
        descriptor, read, source = _input(options)
        _check_outputs(str(source), os.fstat(descriptor), outputs)
        found.requests = requests_in(descriptor, read, source)
    if output and os.path.exists(output.path):  # a new file is created before the first answer
        found.begin()
    return found


def trace_file(options: Options) -> Destination | None:
    """The file of --trace-out of a job without other files. Raises UsageError."""
    trace = _destination("--trace-out", options.trace_out)
    if trace is not None:
        with ExitStack() as created:
            trace.check_writable(created)
    return trace


def _check_outputs(name: str, status: os.stat_result, outputs: list[Destination]) -> None:
    """Raise UsageError unless all outputs can be written and differ from the input."""
    to_stdout = [str(output) for output in outputs if output.descriptor == STDOUT]
    if len(to_stdout) > 1:
        raise UsageError(
            f"{' and '.join(to_stdout)} both go to standard output; give one of them "
            "the name of a file"
        )
    with ExitStack() as created:
        statuses = [(str(output), output.check_writable(created)) for output in outputs]
        check_different([(name, status), *statuses])


def demo_input() -> Path:
    """Return the file of the demo prompts, which is part of the package."""
    return Path(str(files("mellmpi.frontend") / "demo_prompts.jsonl"))


# --- inputs --------------------------------------------------------------------------------------


def _input(options: Options) -> tuple[int, Reader, Source]:
    """Return an open descriptor, its `Reader` and its name."""
    name = str(demo_input()) if options.command == "demo" else options.input_file or "-"
    path = descriptor_path(name)
    if name != "-" and not is_descriptor(path, STDIN):
        source = Source(name)
        descriptor = open_input(path, source)
        return descriptor, descriptor_reader(descriptor), source
    source, standard = Source(None), StandardInput()
    standard.check()
    check_input(STDIN, source)
    return STDIN, standard.read, source


def _check_trace(name: str, output: Destination | None) -> None:
    if not os.path.exists(name):
        raise UsageError(f"--replay {visible(name)} cannot be read: there is no such file")
    if not os.path.isfile(name):
        raise UsageError(
            f"--replay {visible(name)} is not a regular file; type  cat "
            f"{visible(name)} > trace.csv  and give trace.csv"
        )
    if output and os.path.isfile(output.path) and os.path.getsize(output.path):
        raise UsageError(f"{output} exists, and a replay cannot continue it: give another name")


def _workload(options: Options) -> Workload:
    try:
        workload = load(options.replay or "").faster(options.rate_scale or 1.0)
    except ValueError as error:
        raise UsageError(f"--replay {error}") from error
    workload = workload.longer(options.length_scale or 1.0)
    return workload.first(options.max_requests or len(workload))


# --- outputs -------------------------------------------------------------------------------------


def _output(options: Options) -> Destination | None:
    name = options.output_file
    if name is None and options.command == "pipe":
        name = "-"
    return _destination("-o", name, os.O_RDWR)


def _timeline(name: str | None) -> Destination | None:
    if not name:
        return None
    from mellmpi.telemetry.pictures import SUFFIXES

    if Path(name).suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--timeline {visible(name)}: its name must end with the kind of picture, "
            f"one of {' '.join(SUFFIXES)}"
        )
    return _destination("--timeline", name)


def _destination(flag: str, name: str | None, access: int = os.O_WRONLY) -> Destination | None:
    if not name:
        return None
    path = descriptor_path(name)
    if name != "-" and name not in STDOUT_NAMES and not is_descriptor(path, STDOUT):
        return Destination(flag, name, path, access)
    if sys.stdout is None:
        raise UsageError(f"{flag} {name}: standard output is closed; give the name of a file")
    return Destination(flag, name, STDOUT_NAMES[0], access, STDOUT)
