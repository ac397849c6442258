"""Runs a batch with an exception planted in one call of one rank.

`python -m tests.mpi.planted DIRECTORY SITE WHEN NTH RANK` under mpirun. All sites:
`python -m tests.runtime.planted_everywhere [plain]`.
"""

import functools
import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

START = (  # calls of every rank until it serves
    "mellmpi.runtime.ending:_join",
    "mellmpi.transport.control_plane:ControlPlane.__init__",
    "mellmpi.transport.mpi.job:MpiChannel.__init__",
    "mellmpi.transport.control_plane:ControlPlane.gather",
    "mellmpi.transport.mpi.job:MpiJob.check_installation",
    "mellmpi.runtime.connect:device_buffers_proven",
    "mellmpi.transport.mpi.job:MpiJob.connect",
    "mellmpi.transport.doorbell:Doorbell.__init__",
    "mellmpi.transport.doorbell:Doorbell.find",
    "mellmpi.transport.mpi.job:set_yielding",
    "mellmpi.runtime.connect:measure",
    "mellmpi.transport.mpi.job:MpiJob.serve",
)
RUN = (
    "mellmpi.transport.endpoint:Endpoint.poll",
    "mellmpi.transport.endpoint:Endpoint.send",
    "mellmpi.transport.endpoint:Endpoint.wait",
    "mellmpi.transport.messages:encode",
    "mellmpi.transport.messages:decode",
)
END = (
    "mellmpi.transport.endpoint:Endpoint.close",
    "mellmpi.transport.mpi.job:MpiJob.finish",
)
SCHEDULER = (
    "mellmpi.runtime.begin:StandardInput.is_piped",
    "mellmpi.cli.parser:read_options",
    "mellmpi.runtime.launch:_prepare",
    "mellmpi.models.checkpoint:resolve",
    "mellmpi.runtime.run_batch:Rank0.run",
    "mellmpi.runtime.run_batch:Rank0._open",
    "mellmpi.runtime.scheduler:SchedulerLoop.run_once",
    "mellmpi.scheduler.cluster:ClusterScheduler.handle",
    "mellmpi.scheduler.cluster:ClusterScheduler.tick",
    "mellmpi.runtime.batch_front:BatchFront.inbox",
    "mellmpi.runtime.batch_front:BatchFront.deliver",
    "mellmpi.runtime.scheduler:SchedulerLoop.stop",
    "mellmpi.runtime.run_batch:Rank0._conclude",
)
WORKER = (
    "mellmpi.runtime.launch:make_worker",
    "tests.runtime.cell:HashEngine.__init__",
    "mellmpi.runtime.worker:Worker.start",
    "mellmpi.runtime.worker:Worker.run_once",
    "tests.runtime.cell:HashEngine.execute",
    "mellmpi.worker.batch:BatchScheduler.plan",
    "mellmpi.worker.batch:BatchScheduler.commit",
    "mellmpi.worker.batch:BatchScheduler.handle",
)


REPEATED = {  # calls that every run makes several times
    "mellmpi.transport.control_plane:ControlPlane.gather",
    *RUN,
    "mellmpi.runtime.scheduler:SchedulerLoop.run_once",
    "mellmpi.scheduler.cluster:ClusterScheduler.handle",
    "mellmpi.scheduler.cluster:ClusterScheduler.tick",
    "mellmpi.runtime.batch_front:BatchFront.inbox",
    "mellmpi.runtime.batch_front:BatchFront.deliver",
    "mellmpi.runtime.worker:Worker.run_once",
    "tests.runtime.cell:HashEngine.execute",
    "mellmpi.worker.batch:BatchScheduler.plan",
    "mellmpi.worker.batch:BatchScheduler.commit",
    "mellmpi.worker.batch:BatchScheduler.handle",
}


def sites(rank: int) -> tuple[str, ...]:
    """Calls of this rank in which an exception can be planted."""
    return (*START, *RUN, *(WORKER if rank else SCHEDULER), *END)


def plant(site: str, when: str, nth: int, mark: Path) -> None:
    """Make the nth call of `site` raise before or after its work; writes the time to `mark`."""
    module, _, path = site.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    call, calls = getattr(owner, name), iter(range(1, 10**9))

    @functools.wraps(call)
    def planted(*args, **kwargs):
        hit = next(calls) == nth
        if hit and when == "before":
            mark.write_text(str(time.time()))
            raise RuntimeError("planted")
        result = call(*args, **kwargs)
        if hit:
            mark.write_text(str(time.time()))
            raise RuntimeError("planted")
        return result

    setattr(owner, name, planted)


def use_hash_engine() -> None:
    """Replace the engine of workers by one without torch."""
    from mellmpi.protocol import ModelKv
    from tests.runtime import cell

    def build_engine(directories, models, *_, **__):
        return cell.HashEngine(64, (ModelKv(models[0].name, 4, block_bytes=64),))

    sharing = ModuleType("mellmpi.engine.sharing")
    sharing.build_engine = build_engine
    sys.modules["mellmpi.engine.sharing"] = sharing


def main() -> None:
    directory, site, when, nth, rank = Path(sys.argv[1]), *sys.argv[2:]
    variables = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")  # MPI has not started yet
    own_rank = next(os.environ[name] for name in variables if name in os.environ)
    (directory / f"{own_rank}.pid").write_text(str(os.getpid()))
    use_hash_engine()
    if own_rank == rank:
        plant(site, when, int(nth), directory / "planted")
    from mellmpi.cli import main as mellmpi

    code = mellmpi(
        [
            "run-batch",
            "-i",
            str(directory / "in.jsonl"),
            "-o",
            str(directory / "out.jsonl"),
            "--model",
            "random:tiny-llama",
            "--policy",
            "worst_fit",
            "--cache-dir",
            str(directory / "cache"),
        ]
    )
    (directory / f"{own_rank}.json").write_text(json.dumps(code))
    sys.exit(code)


if __name__ == "__main__":
    main()
