"""Starts the role of a process: rank 0 schedules, the others work; a single process does both."""

import errno
import gc
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from mellmpi.config import Config, ModelConfig, Options, UsageError
from mellmpi.files import visible
from mellmpi.frontend import Tokenizer
from mellmpi.models import Architecture, resolve
from mellmpi.runtime.batch_files import open_files, trace_file
from mellmpi.runtime.begin import Begun, ReadOptions
from mellmpi.runtime.calibration import measured_steps
from mellmpi.runtime.connect import connect
from mellmpi.runtime.gpus import GpuAssignment, count_gpus
from mellmpi.runtime.job import Job
from mellmpi.runtime.run_batch import Rank0
from mellmpi.runtime.serve import ServingRank0
from mellmpi.runtime.serving import Door
from mellmpi.runtime.worker import Engine, Worker
from mellmpi.transport import LocalNetwork, Transport


class Runs(Protocol):
    """The role of rank 0."""

    def run(self) -> int: ...


MakeRank0 = Callable[..., Runs]


def launch(job: Job | None, begun: Begun | None, read_options: ReadOptions) -> int:
    """Run this process's role in the job. Returns the exit code. Every rank calls it.

    job           None: there is no MPI, and this is the only process
    begun         None: by its environment this is not the first process of the launch
    read_options  parses the command line, on a rank 0 that has not begun
    """
    if job is not None and job.rank > 0:
        return _worker(job, _shared(job, None))
    begun = begun or Begun(read_options)
    options = begun.options
    if problem := _hosting_problem(options.config, max(1, job.size - 1 if job else 1)):
        raise UsageError(problem)
    door = begun.door
    make_rank0, prepared = _batch(options) if door is None else _server(options, door)
    if job is not None:
        prepared = _shared(job, prepared)
    rank0 = partial(make_rank0, directories=tuple(map(Path, prepared["directories"])))
    if job is None or job.size == 1:
        return _single_process(rank0, options.config, prepared)
    transport = connect(job, options.config)
    rank0 = partial(rank0, transport=transport, hosts=job.hosts)
    return rank0(run_local_worker=lambda: False, on_ready=job.serve).run()


def _batch(options: Options) -> tuple[MakeRank0, dict[str, Any]]:
    """Return rank 0 of a batch, and what every rank must know."""
    files, prepared = open_files(options), _prepare(options)
    tokenizers = () if files.workload is not None else _tokenizers(options, prepared)
    return partial(Rank0, options, options.config, files, tokenizers=tokenizers), prepared


def _server(options: Options, door: Door) -> tuple[MakeRank0, dict[str, Any]]:
    """Return rank 0 of a server, and what every rank must know."""
    trace, prepared = trace_file(options), _prepare(options)
    _tokenizers(options, prepared)
    prepared["serves"] = True
    return partial(ServingRank0, options, options.config, door, trace), prepared


def _shared(job: Job, prepared: dict[str, Any] | None) -> dict[str, Any]:
    """Return rank 0's `prepared` on all ranks. Raises UsageError if ranks do not fit together."""
    _check_installation(job)
    shared: dict[str, Any] = job.share(prepared)
    _check_gpus(job, Config.from_dict(shared["config"]))
    return shared


def _check_installation(job: Job) -> None:
    from mellmpi.transport.mpi import MixedInstallation

    try:
        job.check_installation()
    except MixedInstallation as error:
        raise UsageError(str(error)) from error


def _prepare(options: Options) -> dict[str, Any]:
    """Resolve the models before the workers start. Returns plain data for every rank."""
    cache_dir = _cache_dir(options.cache_dir)
    messages: list[str] = []

    def show(text: str) -> None:
        messages.append(text)
        _show_progress(text)

    try:
        paths = [_resolved(model, cache_dir, show) for model in options.config.models]
    finally:
        if messages:
            sys.stderr.write("\n")
    return {
        "config": options.config.to_dict(),
        "directories": [str(path.absolute()) for path in paths],
        "cache_dir": str(cache_dir.absolute()),
    }


def _cache_dir(given: str | None) -> Path:
    try:
        return Path(given or "~/.cache/mellmpi").expanduser()
    except RuntimeError as error:
        raise UsageError(f"{error}: give a directory with --cache-dir DIR") from error


def _resolved(model: ModelConfig, cache_dir: Path, show: Callable[[str], None]) -> Path:
    try:
        return resolve(model.model, cache_dir, show)
    except ValueError as error:
        raise UsageError(f"--model {visible(model.model)}: {error}") from error


def _tokenizers(options: Options, prepared: dict[str, Any]) -> tuple[Tokenizer, ...]:
    """Return one tokenizer per model. Loaded early, to report errors before a worker starts."""
    template = options.config.model.chat_template
    try:
        return tuple(
            Tokenizer.load(Path(directory), Path(template) if template else None)
            for directory in prepared["directories"]
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _show_progress(text: str) -> None:
    sys.stderr.write(f"\rmellmpi: {text} …".ljust(100))  # overwrites the previous text
    sys.stderr.flush()


# --- roles ---------------------------------------------------------------------------------------


def _worker(job: Job, prepared: dict[str, Any]) -> int:
    config = Config.from_dict(prepared["config"])
    if prepared.get("serves"):  # rank 0 ends the job once open requests are answered
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    transport = connect(job, config)
    assignment = GpuAssignment.of(job.rank, job.local_ranks, count_gpus())
    worker = make_worker(transport, config, prepared, assignment)
    worker.start()
    job.serve()
    while not worker.stopped:
        if not worker.run_once():
            worker.wait()
    return 0


def _single_process(rank0: MakeRank0, config: Config, prepared: dict[str, Any]) -> int:
    """Run scheduler and worker alternately in one process."""
    network = LocalNetwork(1)
    assignment = GpuAssignment(index=0, neighbours=1, num_gpus=count_gpus())
    worker = make_worker(network.transports[1], config, prepared, assignment)
    worker.start()
    return rank0(
        transport=network.transports[0],
        hosts=[socket.gethostname()],
        run_local_worker=worker.run_once,
        on_ready=lambda: None,
    ).run()


def make_worker(
    transport: Transport, config: Config, prepared: dict[str, Any], assignment: GpuAssignment
) -> Worker:
    """Return a worker that builds its engine when it starts, and again when it wakes up."""
    from mellmpi.engine import build_engine

    directories = [Path(name) for name in prepared["directories"]]
    for i, model in enumerate(config.models):
        if not directories[i].is_dir():  # another host without rank 0's files
            directories[i] = _resolved(model, Path(prepared["cache_dir"]), _show_progress)
    use_gpu = assignment.num_gpus and config.device != "cpu"
    share = config.cache.gpu_memory_utilization / assignment.sharers
    cache = replace(config.cache, gpu_memory_utilization=share)

    def build() -> Engine:
        try:
            engine = build_engine(
                directories,
                config.models,
                cache,
                hosted=config.hosted(transport.worker),
                device=assignment.device if use_gpu else config.device,
                num_threads=config.threads
                or max(1, len(os.sched_getaffinity(0)) // assignment.neighbours),
            )
            return cast(Engine, engine)  # its arena's device is a torch.device, not a str
        except ValueError as error:
            raise UsageError(str(error)) from error
        except (MemoryError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOMEM:
                raise
            raise UsageError(
                "there is too little memory for the KV cache: make it smaller with "
                "--kv-cache-memory-bytes SIZE, such as 512M"
            ) from error

    gc.freeze()  # modules are never freed: garbage collection when parking need not visit them
    most_positions = Architecture.from_directory(directories[0]).max_position
    measure = partial(measured_steps, most_positions=most_positions, clock=time.perf_counter)
    return Worker(transport, build, config.batch, config.cache, measure=measure)


# --- hosts and GPUs ------------------------------------------------------------------------------


def _hosting_problem(config: Config, num_workers: int) -> str:
    """Return a message about a model that no worker hosts, or ""."""
    hosted = {name for w in range(1, num_workers + 1) for name in config.hosted(w)}
    missing = [model.name for model in config.models if model.name not in hosted]
    if not missing:
        return ""
    return (
        f"none of the {num_workers} worker(s) hosts {missing[0]}: start more ranks, or add it to "
        "one of the --worker-models"
    )


def _check_gpus(job: Job, config: Config) -> None:
    """Raise UsageError, on all ranks, if a host has more workers than GPUs."""
    packed = job.gather(struct.pack("q", count_gpus() if config.device != "cpu" else 0))
    gpus = [struct.unpack("q", data)[0] for data in packed]
    for host in dict.fromkeys(job.hosts):
        workers = [rank for rank in range(1, job.size) if job.hosts[rank] == host]
        if workers:
            assignment = GpuAssignment(0, len(workers), gpus[workers[0]])
            if problem := assignment.problem(host, config.oversubscribe_gpus):
                raise UsageError(problem)
