"""How fast is the link between two ranks, for one buffer and for scattered KV blocks?

    mpirun -n 2 python bench/bandwidth.py [-m MIN:MAX] [-i ITERATIONS] [-x WARM-UP] [-d cpu|cuda]

The code that measures links at the start of a job. MB = 10^6 bytes. Times include header and
answer.
"""

import argparse
import statistics
import sys
from typing import Any

import numpy as np
from record import add_json_option, finish

from mellmpi.transport.base import Transport
from mellmpi.transport.links import HostArena, Probe
from mellmpi.transport.mpi import Job

BLOCKS = (65_536, 1 << 20)  # bytes each, of scattered KV


def sizes(span: str) -> list[int]:
    """Powers of two from MIN to MAX bytes."""
    low, high = (int(part) for part in span.split(":"))
    return [1 << i for i in range(64) if low <= 1 << i <= high]


def bandwidth(probe: Probe, num_blocks: int, block_bytes: int, scattered: bool,
              args: argparse.Namespace) -> tuple[float, float] | None:  # fmt: skip
    """(seconds a transfer, seconds a small message one way) at rank 0, medians; None at rank 1."""
    arena = HostArena(num_blocks, block_bytes)  # ours to keep: the transport knows its address
    probe.transport.attach(arena)
    order = np.random.default_rng(0)
    places = (order.permutation(num_blocks) if scattered else np.arange(num_blocks)).tolist()
    result = None
    if probe.transport.worker == 1:
        probe.answer(0, places)
    else:
        took, trips = [], []
        for _ in range(args.x + args.i):
            trips.append(probe.round_trip_s(1))
            took.append(probe.transfer_s(1, places[::-1]))
        probe.release(1)
        result = statistics.median(took[args.x :]), statistics.median(trips[args.x :]) / 2
    probe.transport.attach(None)
    return result


def table(transport: Transport, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    probe = Probe(transport)  # one for all sizes: it may hear the next one's question early
    for block_bytes in (None, *BLOCKS):
        kind = "contiguous" if block_bytes is None else f"blocks of {block_bytes}"
        if transport.worker == 0:
            print(f"# {kind}\n# Size      Bandwidth (MB/s)    Latency (us)", file=sys.stderr)
        for size in sizes(args.m):
            if block_bytes is not None and size < 2 * block_bytes:
                continue
            num_blocks = size // (block_bytes or size)
            scattered = block_bytes is not None
            measured = bandwidth(probe, num_blocks, block_bytes or size, scattered, args)
            if measured is None:
                continue
            MBps, latency_us = size / measured[0] / 1e6, measured[1] * 1e6
            print(f"{size:<12}{MBps:>16.2f}{latency_us:>16.2f}", file=sys.stderr)
            rows.append({"kind": kind, "size": size, "MBps": MBps, "latency_us": latency_us})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", default="1024:67108864", metavar="MIN:MAX", help="bytes")
    parser.add_argument("-i", type=int, default=20, help="iterations a size")
    parser.add_argument("-x", type=int, default=3, help="warm-up iterations a size")
    parser.add_argument("-d", choices=["cpu", "cuda"], default="cpu", help="where the blocks are")
    add_json_option(parser)
    args, job = parser.parse_args(), Job()
    if job.size != 2:
        raise SystemExit("two ranks, please: mpirun -n 2 python bench/bandwidth.py")
    if args.d == "cuda":
        if job.rank == 0:
            print("device memory is not measured yet; try -d cpu", file=sys.stderr)
        return job.finish()
    rows = table(job.connect(idle_poll_s=0.005), args)
    if job.rank == 0:
        config = {"sizes": args.m, "iterations": args.i, "warm_up": args.x, "device": args.d}
        finish(config, rows, args.json)
    job.finish()


if __name__ == "__main__":
    main()
