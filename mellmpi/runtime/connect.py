"""Connects the transport of a rank: chooses the path of KV blocks, and measures the links."""

import logging

from mellmpi.config import Config
from mellmpi.protocol import SCHEDULER, LinksMeasured
from mellmpi.runtime.gpus import GpuAssignment, count_gpus
from mellmpi.runtime.job import Job
from mellmpi.transport import Arena, Transport
from mellmpi.transport.blocks import DeviceArena, device_buffers_work
from mellmpi.transport.probes import BLOCK_BYTES, NUM_BLOCKS, measure_links

log = logging.getLogger(__name__)


def connect(job: Job, config: Config) -> Transport:
    """Return the transport of this rank. Every rank calls it before it sends anything else.

    If links were measured, the first `poll` of the scheduler returns `LinksMeasured`.
    """
    options = config.transport
    device_buffers = device_buffers_proven(job, config)
    transport: Transport = job.connect(options.idle_poll_s, device_buffers, options.checksums)
    if transport.worker == 1:  # rank 0 may be on a host without GPU
        log.info("blocks travel %s, checksums %s", path(config, device_buffers), options.checksums)
    if options.measure_links:
        measure(transport, job.hosts, probe_arena(job, config))
    return transport


def path(config: Config, device_buffers: bool, num_gpus: int | None = None) -> str:
    """Return how KV blocks travel, in words. `num_gpus`: of a worker's host; None: of this host."""
    if config.device == "cpu" or not (count_gpus() if num_gpus is None else num_gpus):
        return "from host memory to host memory, in place"
    if device_buffers:
        return "from device memory to device memory, by MPI, without checksums"
    return "through pinned host memory"


def probe_arena(job: Job, config: Config) -> Arena | None:
    """Return blocks in the device memory of this worker, to measure links; None: host memory."""
    if job.rank == SCHEDULER or config.device == "cpu" or not (num_gpus := count_gpus()):
        return None
    assignment = GpuAssignment.of(job.rank, job.local_ranks, num_gpus)
    return DeviceArena(NUM_BLOCKS, BLOCK_BYTES, assignment.device)


def measure(transport: Transport, hosts: list[str], arena: Arena | None = None) -> None:
    """Measure the links of all workers, in about a second. Every rank calls it.

    hosts  of every rank
    arena  blocks to send; None: in host memory
    """
    if transport.num_workers < 2:
        return
    links = measure_links(transport, hosts, arena=arena)
    if links is not None:
        for row in lines(links):
            log.info("%s", row)
        transport.unread([(SCHEDULER, links)])


def lines(links: LinksMeasured) -> list[str]:
    """Return one line per link, in words."""
    rows = zip(links.srcs, links.dsts, links.latency_s, links.Bps, strict=True)
    return [
        f"host {src} to host {dst}: {Bps / 1e6:.0f} MB/s, {latency_s * 1e6:.0f} µs"
        for src, dst, latency_s, Bps in rows
    ]


def device_buffers_proven(job: Job, config: Config) -> bool:
    """Return whether MPI may send device memory. Every rank calls it.

    True only if a trial works on every host, and checksums are not required: the CPU, which
    computes checksums, does not read blocks on this path.
    """
    options = config.transport
    wanted = config.device != "cpu" and options.device_buffers == "auto"
    wanted = wanted and options.checksums != "always"
    first_here = job.rank == job.local_ranks[0]
    proven = True
    if wanted and first_here and count_gpus():
        proven = device_buffers_work("cuda:0")
        if proven and len(set(job.hosts)) > 1:
            proven = device_buffers_work("cuda:0", far=True)
    has_gpu = wanted and count_gpus() > 0
    answers = job.gather(bytes([proven, has_gpu]))
    return all(answer[0] for answer in answers) and any(answer[1] for answer in answers)
