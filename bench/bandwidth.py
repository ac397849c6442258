"""How fast is the link between two ranks, for one buffer and for scattered KV blocks?

    mpirun -n 2 python bench/bandwidth.py [-m MIN:MAX] [-i ITERATIONS] [-x WARM-UP] [-d cpu|cuda]

Uses the code that measures links at the start of a job, and that migrations use: within a host the
receiver reads blocks out of the sender's memory, between hosts there is one message per block, in
place. Contiguous: one block. Times include header and answer. MB = 10^6 bytes. Latency: one way of
a small message, between transfers of this size. With `-d cuda` the blocks are in device memory and
are staged through pinned host memory; a second table follows if this MPI is proven to take device
memory. Without a GPU it prints a message.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from record import add_json_option, finish

from mellmpi.runtime.gpus import count_gpus
from mellmpi.transport import Arena, Transport
from mellmpi.transport.blocks import DeviceArena, device_buffers_work
from mellmpi.transport.mpi import MpiJob
from mellmpi.transport.probes import HostArena, Probe

BLOCKS = (65_536, 1 << 20)  # bytes per block of scattered KV


def span(text: str) -> tuple[int, int]:
    """Parse MIN:MAX, or MAX alone (MIN 1)."""
    low, _, high = text.rpartition(":")
    return (int(low) if low else 1, int(high))


def at_least(least: int) -> Callable[[str], int]:
    """Returns a parser of integers that rejects smaller numbers."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: {least} at the least")
        return int(text)

    return number


def sizes(low: int, high: int) -> list[int]:
    """Powers of two from low to high."""
    return [1 << i for i in range(64) if low <= 1 << i <= high]


def arena_on(device: str, num_blocks: int, block_bytes: int) -> Arena:
    if device == "cpu":
        return HostArena(num_blocks, block_bytes)
    return DeviceArena(num_blocks, block_bytes, device)


def bandwidth(
    probe: Probe, arena: Arena, scattered: bool, args: argparse.Namespace
) -> tuple[float, float] | None:
    """Returns medians at rank 0: seconds per transfer, one-way seconds of a small message."""
    probe.transport.attach(arena)
    order = np.random.default_rng(0)
    blocks = np.arange(arena.num_blocks)
    block_ids = (order.permutation(blocks) if scattered else blocks).tolist()
    result = None
    if probe.transport.worker == 1:
        probe.answer(0, block_ids)
    else:
        took, trips = [], []
        for _ in range(args.x + args.i):
            trips.append(probe.round_trip_s(1))
            took.append(probe.transfer_s(1, block_ids[::-1]))
        probe.end(1)
        result = statistics.median(took[args.x :]), statistics.median(trips[args.x :]) / 2
    probe.transport.attach(None)
    return result


def table(
    transport: Transport, device: str, path: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    probe = Probe(transport)  # one for all sizes: it may receive messages of the next size early
    for block_bytes in (None, *BLOCKS):
        kind = "contiguous" if block_bytes is None else f"blocks of {block_bytes}"
        if transport.worker == 0:
            print(f"# {path}, {kind}\n# Size      Bandwidth (MB/s)    Latency (us)")
        for size in sizes(*span(args.m)):
            if block_bytes is not None and size < 2 * block_bytes:
                continue
            arena = arena_on(device, size // (block_bytes or size), block_bytes or size)
            measured = bandwidth(probe, arena, block_bytes is not None, args)
            if measured is None:
                continue
            MBps, latency_us = size / measured[0] / 1e6, measured[1] * 1e6
            print(f"{size:<12}{MBps:>16.2f}{latency_us:>16.2f}", flush=True)
            rows.append(
                {"path": path, "kind": kind, "size": size, "MBps": MBps, "latency_us": latency_us}
            )
    return rows


def paths(job: MpiJob, args: argparse.Namespace) -> list[tuple[str, str, bool]]:
    """Returns (name, device, whether MPI gets device memory) of each path to measure."""
    if args.d == "cpu":
        return [("host memory", "cpu", False)]
    gpus = [job.gather(bytes([count_gpus()]))[rank][0] for rank in range(2)]
    if not all(gpus):
        return []
    device = f"cuda:{job.local_ranks.index(job.rank) % gpus[job.rank]}"
    proven = device_buffers_work(device) if job.rank == job.local_ranks[0] else True
    direct = all(answer[0] for answer in job.gather(bytes([proven])))
    found = [("device memory through the host", device, False)]
    return [*found, ("device memory by MPI", device, True)] if direct else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", default="1024:67108864", metavar="[MIN:]MAX", help="bytes")
    parser.add_argument("-i", type=at_least(1), default=20, help="iterations per size")
    parser.add_argument("-x", type=at_least(0), default=3, help="warm-up iterations per size")
    parser.add_argument("-d", choices=["cpu", "cuda"], default="cpu", help="where the blocks are")
    add_json_option(parser)
    args, job = parser.parse_args(), MpiJob()
    if job.size != 2:
        raise SystemExit("two ranks, please: mpirun -n 2 python bench/bandwidth.py")
    found = paths(job, args)
    if not found and job.rank == 0:
        print(
            "no GPU on both ranks: nothing to measure; -d cpu measures host memory", file=sys.stderr
        )
    rows = []
    for path, device, device_buffers in found:
        transport = job.connect(0.005, device_buffers, checksums="never")
        rows += table(transport, device, path, args)
        transport.close()
    if found and job.rank == 0:
        config = {"sizes": args.m, "iterations": args.i, "warm_up": args.x, "device": args.d}
        finish(config, rows, args.json, shown=False)
    job.finish()


if __name__ == "__main__":
    main()
