"""From a started process to its role: rank 0 schedules, the others work, one alone does both."""

import errno
import gc
import os
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mellmpi.config import Config, ModelConfig, Options, UsageError
from mellmpi.frontend import Tokenizer, visible
from mellmpi.models import Architecture, resolve
from mellmpi.runtime.batch_files import open_files
from mellmpi.runtime.calibration import measured_steps
from mellmpi.runtime.connect import connect
from mellmpi.runtime.gpus import GpuAssignment, count_gpus
from mellmpi.runtime.run_batch import Rank0
from mellmpi.runtime.standard_input import StandardInput
from mellmpi.runtime.worker import Engine, Worker
from mellmpi.transport import LocalNetwork, Transport

ReadOptions = Callable[[Callable[[], bool]], Options]


def launch(job: Any, read_options: ReadOptions) -> int:
    """Play this process's part in the job; its exit code. Every rank calls it.

    job           the MPI job; None: this process is alone
    read_options  of rank 0: the command line, made into Options
    """
    if job is not None and job.rank > 0:
        return _worker(job, _shared(job, None))
    options = read_options(StandardInput().is_piped)
    if problem := _hosting_problem(options.config, max(1, job.size - 1 if job else 1)):
        raise UsageError(problem)
    files, prepared = open_files(options), _prepare(options)
    tokenizers = () if files.workload is not None else _tokenizers(options, prepared)
    if job is not None:
        prepared = _shared(job, prepared)
    directories = tuple(map(Path, prepared["directories"]))
    rank0 = partial(Rank0, options, options.config, files, directories, tokenizers)
    if job is None or job.size == 1:
        return _alone(rank0, options.config, prepared)
    return rank0(connect(job, options.config), beside=lambda: False, ready=job.serve).run()


def _shared(job: Any, prepared: dict[str, Any] | None) -> dict[str, Any]:
    """What rank 0 has prepared, on all ranks. UsageError where they do not fit together."""
    _check_installation(job)
    shared: dict[str, Any] = job.share(prepared)
    _check_seats(job, Config.from_dict(shared["config"]))
    return shared


def _check_installation(job: Any) -> None:
    from mellmpi.transport.mpi import MixedInstallation

    try:
        job.check_installation()
    except MixedInstallation as error:
        raise UsageError(str(error)) from error


def _prepare(options: Options) -> dict[str, Any]:
    """All that can be found out before the workers start; plain data for every rank."""
    cache_dir = _cache_dir(options.cache_dir)
    said: list[str] = []
    directories: list[str] = []
    try:
        for model in options.config.models:
            tell = lambda text: (said.append(text), _say(text))[1]  # noqa: E731
            directories.append(str(_resolved(model, cache_dir, tell).absolute()))
    finally:
        if said:
            sys.stderr.write("\n")
    return {
        "config": options.config.to_dict(),
        "directories": directories,
        "cache_dir": str(cache_dir.absolute()),
    }


def _cache_dir(given: str | None) -> Path:
    try:
        return Path(given or "~/.cache/mellmpi").expanduser()
    except RuntimeError as error:
        raise UsageError(f"{error}: give a directory with --cache-dir DIR") from error


def _resolved(model: ModelConfig, cache_dir: Path, tell: Callable[[str], None]) -> Path:
    try:
        return resolve(model.model, cache_dir, tell)
    except ValueError as error:
        raise UsageError(f"--model {visible(model.model)}: {error}") from error


def _tokenizers(options: Options, prepared: dict[str, Any]) -> tuple[Tokenizer, ...]:
    """One a model. They are needed late, but their faults are found before a worker starts."""
    template = options.config.model.chat_template
    try:
        return tuple(
            Tokenizer.load(Path(directory), Path(template) if template else None)
            for directory in prepared["directories"]
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _say(text: str) -> None:
    sys.stderr.write(f"\rmellmpi: {text} …".ljust(100))  # one line, again and again
    sys.stderr.flush()


# --- roles ---------------------------------------------------------------------------------------


def _worker(job: Any, prepared: dict[str, Any]) -> int:
    config = Config.from_dict(prepared["config"])
    transport = connect(job, config)
    seat = GpuAssignment.of(job.rank, job.neighbours, count_gpus())
    worker = make_worker(transport, config, prepared, seat)
    worker.start()
    job.serve()
    while not worker.stopped:
        if not worker.turn():
            worker.wait()
    return 0


def _alone(rank0: Callable[..., Rank0], config: Config, prepared: dict[str, Any]) -> int:
    """Scheduler and worker take turns in one process."""
    network = LocalNetwork(1)
    seat = GpuAssignment(index=0, neighbours=1, num_gpus=count_gpus())
    worker = make_worker(network.transports[1], config, prepared, seat)
    worker.start()
    return rank0(network.transports[0], beside=worker.turn, ready=lambda: None).run()


def make_worker(
    transport: Transport, config: Config, prepared: dict[str, Any], seat: GpuAssignment
) -> Worker:
    """A worker whose engine is built when it starts, and again whenever it wakes."""
    from mellmpi.engine import build_engine

    directories = [Path(name) for name in prepared["directories"]]
    for i, model in enumerate(config.models):
        if not directories[i].is_dir():  # another host, another disk
            directories[i] = _resolved(model, Path(prepared["cache_dir"]), _say)
    use_gpu = seat.num_gpus and config.device != "cpu"
    share = config.cache.gpu_memory_utilization / seat.sharers
    cache = replace(config.cache, gpu_memory_utilization=share)

    def build() -> Engine:
        try:
            return build_engine(
                directories,
                config.models,
                cache,
                hosted=config.hosted(transport.worker),
                device=seat.device if use_gpu else config.device,
                num_threads=config.threads
                or max(1, len(os.sched_getaffinity(0)) // seat.neighbours),
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        except (MemoryError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOMEM:
                raise
            raise UsageError(
                "there is too little memory for the KV cache: give less with "
                "--kv-cache-memory-bytes SIZE, such as 512M"
            ) from error

    gc.freeze()  # modules stay: a worker that parks need not look through them for what it can free
    most_positions = Architecture.from_directory(directories[0]).max_position
    measure = partial(measured_steps, most_positions=most_positions, clock=time.perf_counter)
    return Worker(transport, build, config.batch, config.cache, measure=measure)


# --- hosts and GPUs ------------------------------------------------------------------------------


def _hosting_problem(config: Config, num_workers: int) -> str:
    """A model that no worker hosts, in words for the user."""
    hosted = {name for w in range(1, num_workers + 1) for name in config.hosted(w)}
    missing = [model.name for model in config.models if model.name not in hosted]
    if not missing:
        return ""
    return (
        f"none of the {num_workers} worker(s) hosts {missing[0]}: start more ranks, or name it "
        "in another --worker-models"
    )


def _check_seats(job: Any, config: Config) -> None:
    """Raise UsageError, on all ranks alike, if a host has more workers than GPUs."""
    packed = job.gather(struct.pack("q", count_gpus() if config.device != "cpu" else 0))
    gpus = [struct.unpack("q", one)[0] for one in packed]
    for host in dict.fromkeys(job.hosts):
        workers = [rank for rank in range(1, job.size) if job.hosts[rank] == host]
        if workers:
            seat = GpuAssignment(0, len(workers), gpus[workers[0]])
            if problem := seat.problem(host, config.oversubscribe_gpus):
                raise UsageError(problem)
