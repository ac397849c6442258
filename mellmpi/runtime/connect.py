"""The transport of a rank: which way blocks travel, and how fast its links are."""

import logging
from typing import Any

from mellmpi.config import Config
from mellmpi.protocol import SCHEDULER, LinksMeasured
from mellmpi.runtime.gpus import GpuAssignment, count_gpus
from mellmpi.transport import Arena, Transport
from mellmpi.transport.blocks import DeviceArena, device_buffers_work
from mellmpi.transport.probes import BLOCK_BYTES, NUM_BLOCKS, measure_links

log = logging.getLogger(__name__)


def connect(job: Any, config: Config) -> Transport:
    """Every rank calls it, before anything else is sent. The scheduler finds `LinksMeasured` in its
    first poll, if links were measured."""
    options = config.transport
    device_buffers = device_buffers_proven(job, config)
    transport: Transport = job.connect(options.idle_poll_s, device_buffers, options.checksums)
    if transport.worker == 1:  # one says it; rank 0 may be where there is no GPU
        log.info("blocks travel %s, checksums %s", path(config, device_buffers), options.checksums)
    if options.measure_links:
        measure(transport, job.hosts, probe_arena(job, config))
    return transport


def path(config: Config, device_buffers: bool, num_gpus: int | None = None) -> str:
    """How KV blocks travel, in words."""
    if config.device == "cpu" or not (count_gpus() if num_gpus is None else num_gpus):
        return "from host memory to host memory, in place"
    if device_buffers:
        return "from device memory to device memory, by MPI, which nothing can check"
    return "through pinned host memory"


def probe_arena(job: Any, config: Config) -> Arena | None:
    """Blocks where this worker's KV will be, to measure links with; None: host memory will do."""
    if job.rank == SCHEDULER or config.device == "cpu" or not (num_gpus := count_gpus()):
        return None
    seat = GpuAssignment.of(job.rank, job.neighbours, num_gpus)
    return DeviceArena(NUM_BLOCKS, BLOCK_BYTES, seat.device)


def measure(transport: Transport, hosts: list[str], arena: Arena | None = None) -> None:
    """Links of all workers, in about a second; the scheduler is told by its own transport."""
    if transport.num_workers < 2:
        return
    links = measure_links(transport, hosts, arena=arena)
    if links is not None:
        for row in lines(links):
            log.info("%s", row)
        transport.unread([(SCHEDULER, links)])


def lines(links: LinksMeasured) -> list[str]:
    """A line a link, in words."""
    rows = zip(links.srcs, links.dsts, links.latency_s, links.Bps, strict=True)
    return [
        f"host {src} to host {dst}: {Bps / 1e6:.0f} MB/s, {latency_s * 1e6:.0f} µs"
        for src, dst, latency_s, Bps in rows
    ]


def device_buffers_proven(job: Any, config: Config) -> bool:
    """May MPI be handed device memory? Only if that is proven on every host, and nobody insists on
    checksums: no processor of ours reads what travels so."""
    options = config.transport
    wanted = config.device != "cpu" and options.device_buffers == "auto"
    wanted = wanted and options.checksums != "always"
    first_here = job.rank == job.neighbours[0]
    proven = True
    if wanted and first_here and count_gpus():
        proven = device_buffers_work("cuda:0")
        if proven and len(set(job.hosts)) > 1:
            proven = device_buffers_work("cuda:0", far=True)
    has_gpu = wanted and count_gpus() > 0
    answers = job.gather(bytes([proven, has_gpu]))
    return all(answer[0] for answer in answers) and any(answer[1] for answer in answers)
