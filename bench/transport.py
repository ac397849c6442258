"""What do messages and migrations cost, against bare MPI and against nothing to do?

    launch/mpirun.sh -n 4 python bench/transport.py

Worker 1 sends to worker 2; the others sleep, as in a cluster with little to do. Everything is
timed at the sender, from the first call to the receiver's answer; competitors alternate.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mellmpi.protocol import Cancel, KvPayload, Stop
from mellmpi.transport.base import Transport
from mellmpi.transport.mpi import Job

MIGRATION = (63, 737_280)  # (blocks, bytes each): 1,000 tokens of the demo model in fp32
BLOCK_SIZES = (65_536, 262_144, 737_280, 1_048_576)
SWEEP_BYTES = 64 << 20
REPEATS = 21
IDLE_S = 5.0


class BenchArena:
    device = "cpu"

    def __init__(self, num_blocks: int, block_bytes: int):
        self.blocks = np.ones((num_blocks, block_bytes), np.uint8)
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.address = self.blocks.ctypes.data


def receive(transport: Transport) -> Any:
    """The next message, as a worker's loop would get it."""
    while True:
        if came := transport.poll():
            assert len(came) == 1
            return came[0][1]
        transport.progress()
        transport.wait(1.0)


def finish(transport: Transport, transfer: Any) -> None:
    while not transfer.done:
        if not transport.progress():
            transport.wait(0.1)
    assert not transfer.failed


def header(num_blocks: int) -> KvPayload:
    outputs = tuple(range(500))
    return KvPayload(1, 2, "layout", 0, num_blocks, 1000, outputs, (), True, 2)


def migrate(transport: Transport, num_blocks: int) -> float:
    """One migration out of worker 1: seconds until worker 2 says that all is there."""
    started_s = time.perf_counter()
    transport.send(2, header(num_blocks))
    transfer = transport.send_blocks(2, 2, range(num_blocks))
    assert isinstance(receive(transport), Cancel)
    elapsed_s = time.perf_counter() - started_s
    finish(transport, transfer)
    return elapsed_s


def accept(transport: Transport, places: list[int]) -> float:
    """The same, at worker 2, into other places: seconds from header to last block."""
    assert receive(transport).num_blocks == len(places)
    transfer = transport.receive_blocks(1, 2, places)
    finish(transport, transfer)
    transport.send(1, Cancel(1, "gone"))
    return transfer.elapsed_s


def bare(comm: MPI.Intracomm, arena: BenchArena) -> float:
    """One blocking MPI_Send of as many bytes, and an answer."""
    whole, answer = [arena.blocks, MPI.BYTE], bytearray(1)
    started_s = time.perf_counter()
    if comm.rank == 1:
        comm.Send(whole, 2)
        comm.Recv([answer, MPI.BYTE], 2)
    else:
        comm.Recv(whole, 1)
        comm.Send([answer, MPI.BYTE], 1)
    return time.perf_counter() - started_s


def compare(transport: Transport, num_blocks: int, block_bytes: int) -> dict[str, Any]:
    """Migration against one MPI_Send, in turn; medians. Workers 1 and 2 together."""
    arena = BenchArena(num_blocks, block_bytes)
    transport.attach(arena)
    places = np.random.default_rng(0).permutation(num_blocks).tolist()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS + 2):
        times[0].append(bare(MPI.COMM_WORLD, arena))
        if transport.worker == 1:
            times[1].append(migrate(transport, num_blocks))
        else:
            times[1].append(accept(transport, places))
    transport.attach(None)
    one_send_s, migration_s = (statistics.median(t[2:]) for t in times)
    if transport.worker != 1:
        MPI.COMM_WORLD.send(migration_s, 1)
        return {}
    transfer_s = MPI.COMM_WORLD.recv(source=2)
    best = [min(t[2:]) for t in times]  # what a busy machine disturbs least
    num_bytes = num_blocks * block_bytes
    return {
        "num_blocks": num_blocks,
        "block_bytes": block_bytes,
        "one_send_ms": round(one_send_s * 1e3, 3),
        "migration_ms": round(migration_s * 1e3, 3),
        "transfer_ms": round(transfer_s * 1e3, 3),  # header to last block, as reports have it
        "one_send_GBps": round(num_bytes / one_send_s / 1e9, 2),
        "migration_GBps": round(num_bytes / migration_s / 1e9, 2),
        "ratio": round(migration_s / one_send_s, 3),
        "ratio_of_bests": round(best[1] / best[0], 3),
    }


def round_trips(transport: Transport, pause_s: float, repeats: int) -> dict[str, float]:
    """Small messages from worker 1 to 2 and back, in µs; `pause_s` lets the other one sleep."""
    times = []
    for _ in range(repeats):
        if transport.worker == 1:
            time.sleep(pause_s)
            started_s = time.perf_counter()
            transport.send(2, Cancel(1, "gone"))
            receive(transport)
            times.append(time.perf_counter() - started_s)
        else:
            transport.send(1, receive(transport))
    times = sorted(times) or [0.0]
    return {
        "p50": round(times[len(times) // 2] * 1e6, 1),
        "p99": round(times[-len(times) // 100] * 1e6, 1),
    }


def poll_us(transport: Transport) -> float:
    started_s = time.perf_counter()
    for _ in range(10_000):
        transport.poll()
    return round((time.perf_counter() - started_s) * 100, 2)


def idle_cpu(transport: Transport) -> float:
    """Share of one core that this rank uses while nothing happens."""
    MPI.COMM_WORLD.Barrier()
    used_s, stop_s = time.process_time(), time.monotonic() + IDLE_S
    while time.monotonic() < stop_s:
        transport.poll()
        transport.progress()
        transport.wait(1.0)
    return (time.process_time() - used_s) / IDLE_S


def measure(transport: Transport) -> dict[str, Any]:
    """At worker 1, with worker 2 in step."""
    results: dict[str, Any] = {
        "round_trip_busy_us": round_trips(transport, 0.0, 2000),
        "round_trip_after_pause_us": round_trips(transport, 0.005, 200),
        "migration_1000_tokens": compare(transport, *MIGRATION),
        "by_block_size": [compare(transport, SWEEP_BYTES // b, b) for b in BLOCK_SIZES],
        "empty_poll_us": poll_us(transport),
    }
    return results


def main() -> None:
    job = Job()
    transport = job.connect(idle_poll_s=0.005)
    if transport.worker in (1, 2):
        results = measure(transport)
    if transport.worker == 1:
        for other in (0, 3):
            transport.send(other, Stop())
    elif transport.worker in (0, 3):
        receive(transport)
    idle = MPI.COMM_WORLD.gather(idle_cpu(transport), 1)
    if transport.worker == 1:
        results["idle_cpu_share_of_one_core"] = round(sum(idle), 4)
        results["idle_ranks"] = len(idle)
        print(json.dumps({**surroundings(), "results": results}, indent=1), flush=True)
    job.finish()


def surroundings() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "bench": "transport",
        "commit": commit,
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "mpi": MPI.Get_library_version().split(",")[0],
        "repeats": REPEATS,
        "load_average": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    main()
