"""From a started process to its role: rank 0 schedules, the others work, one alone does both."""

import gc
import logging
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mellmpi.config import Config, UsageError
from mellmpi.engine.checkpoint import resolve
from mellmpi.options import Options
from mellmpi.runtime.batch_files import BatchFiles, open_files
from mellmpi.runtime.connect import connect
from mellmpi.runtime.gpus import Seat, count_gpus
from mellmpi.runtime.standard_input import StandardInput
from mellmpi.runtime.worker import SchedulerLost, Worker
from mellmpi.transport.base import Transport
from mellmpi.transport.local import LocalNetwork

USAGE = 2  # exit code of a user's mistake

log = logging.getLogger(__name__)
ReadOptions = Callable[[Callable[[], bool]], Options]


def launch(read_options: ReadOptions, world_problem: Callable[[int], str], speaks: bool) -> int:
    """Play this process's part in the job; its exit code. Every rank calls it.

    read_options   of rank 0: the command line, made into Options
    world_problem  why a world of so many ranks is not what the user asked for, or ""
    speaks         False: another process of a broken world says what is wrong
    """
    logging.basicConfig(format="mellmpi[%(process)d] %(levelname)s %(name)s: %(message)s")
    logging.getLogger("mellmpi").setLevel(logging.INFO)  # how blocks travel, and how fast
    job = _join()
    rank, size = (job.rank, job.size) if job else (0, 1)
    prepared: Any = None
    if rank == 0:
        try:
            if problem := world_problem(size):
                raise UsageError(problem)
            options = read_options(StandardInput().is_piped)
            if problem := _hosting_problem(options.config, max(1, size - 1)):
                raise UsageError(problem)
            files, prepared = open_files(options), _prepare(options)
        except UsageError as error:
            if speaks:
                sys.stderr.write(f"mellmpi: {error}\n")
            prepared = {"exit": USAGE}
    if job is None:
        return prepared["exit"] if "exit" in prepared else _alone(options, prepared, files)
    problem = _installation_problem(job)
    prepared = job.share({"exit": USAGE} if problem else prepared)
    if "exit" not in prepared:
        problem = _seating_problem(job, prepared)
    if problem:
        if rank == 0:
            sys.stderr.write(f"mellmpi: {problem}\n")
        prepared = {"exit": USAGE}
    if "exit" in prepared:
        job.finish()
        return int(prepared["exit"])
    if size == 1:
        return _alone(options, prepared, files)
    return _rank0(job, options, prepared, files) if rank == 0 else _worker(job, prepared)


def examine(config: Config, speaks: bool) -> int:
    """The command `doctor`, on every rank; its exit code."""
    from mellmpi.runtime.doctor import doctor

    return doctor(config, _join(), speaks)


def _join() -> Any:
    """The MPI job, or None where there is no MPI: one process can do without."""
    try:
        from mellmpi.transport.mpi import Job
    except (ImportError, RuntimeError) as error:
        log.info("no MPI here (%s): scheduler and worker in one process", error)
        return None
    return Job()


def _installation_problem(job: Any) -> str:
    from mellmpi.transport.mpi import MixedInstallation

    try:
        job.check_installation()
    except MixedInstallation as error:
        return str(error)
    return ""


def _prepare(options: Options) -> dict[str, Any]:
    """All that can be found out before the workers start; plain data for every rank."""
    cache_dir = Path(options.cache_dir or Path.home() / ".cache" / "mellmpi").expanduser()
    said: list[str] = []
    directories: list[str] = []
    try:
        for model in options.config.models:
            tell = lambda text: (said.append(text), _say(text))[1]  # noqa: E731
            directories.append(str(resolve(model.model, cache_dir, tell).absolute()))
    except ValueError as error:
        raise UsageError(f"--model {model.model}: {error}") from error
    finally:
        if said:
            sys.stderr.write("\n")
    return {
        "config": options.config.to_dict(),
        "directories": directories,
        "cache_dir": str(cache_dir.absolute()),
    }


def _say(text: str) -> None:
    sys.stderr.write(f"\rmellmpi: {text} …".ljust(100))  # one line, again and again
    sys.stderr.flush()


# --- roles ---------------------------------------------------------------------------------------


def _rank0(job: Any, options: Options, prepared: dict[str, Any], files: BatchFiles) -> int:
    from mellmpi.runtime.run_batch import Rank0

    config = options.config
    try:
        transport = connect(job, config)
        directories = tuple(map(Path, prepared["directories"]))
        code = Rank0(options, config, files, directories, transport, lambda: False).run()
    except (UsageError, ValueError) as error:
        sys.stderr.write(f"mellmpi: {error}\n")
        return job.abort(USAGE)
    except BaseException:
        log.exception("the scheduler ended")
        return job.abort(1)
    job.finish()
    return code


def _worker(job: Any, prepared: dict[str, Any]) -> int:
    config = Config.from_dict(prepared["config"])
    try:
        transport = connect(job, config)
        seat = Seat.of(job.rank, job.neighbours, count_gpus())
        worker = make_worker(transport, config, prepared, seat)
        worker.start()
        while not worker.stopped:
            if not worker.turn():
                worker.wait()
    except SchedulerLost:
        job.vanish(1)
    except (UsageError, ValueError) as error:
        sys.stderr.write(f"mellmpi: {error}\n")
        sys.stderr.flush()
        job.vanish(USAGE)
    except BaseException:
        log.exception("worker %d ended", job.rank)
        job.vanish(1)
    job.finish()
    return 0


def _alone(options: Options, prepared: dict[str, Any], files: BatchFiles) -> int:
    """Scheduler and worker take turns in one process."""
    from mellmpi.runtime.run_batch import Rank0

    network = LocalNetwork(1)
    seat = Seat(index=0, neighbours=1, num_gpus=count_gpus())
    worker = make_worker(network.transports[1], options.config, prepared, seat)
    try:
        worker.start()
        directories = tuple(map(Path, prepared["directories"]))
        transport = network.transports[0]
        return Rank0(options, options.config, files, directories, transport, worker.turn).run()
    except (UsageError, ValueError) as error:
        sys.stderr.write(f"mellmpi: {error}\n")
        return USAGE


def make_worker(transport: Transport, config: Config, prepared: dict[str, Any],
                seat: Seat) -> Worker:  # fmt: skip
    """A worker whose engine is built when it starts, and again whenever it wakes."""
    from mellmpi.engine.sharing import build_engine  # imports torch

    directories = [Path(name) for name in prepared["directories"]]
    for i, model in enumerate(config.models):
        if not directories[i].is_dir():  # another host, another disk
            directories[i] = resolve(model.model, Path(prepared["cache_dir"]), _say)
    use_gpu = seat.num_gpus and config.device != "cpu"
    share = config.cache.gpu_memory_utilization / seat.sharers
    build = partial(
        build_engine, directories, config.models,
        replace(config.cache, gpu_memory_utilization=share),
        hosted=config.hosted(transport.worker),
        device=seat.device if use_gpu else config.device,
        num_threads=config.threads or max(1, len(os.sched_getaffinity(0)) // seat.neighbours),
    )  # fmt: skip
    gc.freeze()  # modules stay: a worker that parks need not look through them for what it can free
    return Worker(transport, build, config.batch, config.cache)


# --- hosts and GPUs ------------------------------------------------------------------------------


def _hosting_problem(config: Config, num_workers: int) -> str:
    """A model that no worker hosts, in words for the user."""
    hosted = {name for w in range(1, num_workers + 1) for name in config.hosted(w)}
    missing = [model.name for model in config.models if model.name not in hosted]
    if not missing:
        return ""
    return (f"none of the {num_workers} worker(s) hosts {missing[0]}: start more ranks, or name it "
            "in another --worker-models")  # fmt: skip


def _seating_problem(job: Any, prepared: dict[str, Any]) -> str:
    """More workers than GPUs on some host, in words for the user; the same on every rank."""
    config = Config.from_dict(prepared["config"])
    packed = job.gather(struct.pack("q", count_gpus() if config.device != "cpu" else 0))
    gpus = [struct.unpack("q", one)[0] for one in packed]
    for host in dict.fromkeys(job.hosts):
        workers = [rank for rank in range(1, job.size) if job.hosts[rank] == host]
        if workers:
            seat = Seat(0, len(workers), gpus[workers[0]])
            if problem := seat.problem(host, config.oversubscribe_gpus):
                return problem
    return ""
