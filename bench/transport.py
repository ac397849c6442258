"""What do messages and transfers cost, idle and while the destination decodes, on three links?

    python bench/transport.py [--links shm tcp 10gbit] [--json FILE]

Each link is a job of 4 ranks: worker 1 sends to worker 2, and the others sleep. `10gbit` needs
root: it sets up two hosts as network namespaces (bench/two_hosts.sh). Transfers are timed at the
sender, from the first call to the receiver's answer. Competitors alternate in the same job:

one_message  one MPI_Send of as many bytes
carried      as in the runtime, moved by the progress thread: within a host the receiver reads the
             blocks out of the sender's memory, between hosts there is one message per block
checked      the same, with a checksum of every block
steps        without the progress thread: moved between decode steps
messages     only on shm: one message per block there, too

one_message_decoding is the bound on this machine while its cores decode: the one large message is
received by a second thread of the destination while the first thread decodes. It does not wait for
the end of a step, so compare it with `moving_of_one_message_decoding`.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decoder import FREE_BLOCKS, REQUESTS, Decoder
from record import add_json_option, finish
from transfers import accept, one_message, one_message_during, receive, send

from mellmpi.protocol import Cancel, Stop
from mellmpi.transport import Transport
from mellmpi.transport.probes import HostArena

HERE = Path(__file__).resolve().parent
OB1 = ["--mca", "pml", "ob1", "--with-ft", "ulfm"]
LINKS = {  # flags of mpirun
    "shm": ["--mca", "btl", "sm,self,tcp"],
    "tcp": ["--mca", "btl", "tcp,self"],
    "10gbit": ["--mca", "btl", "tcp,self", "-host", "10.78.0.1:2,10.78.0.2:2"],
}
BARS = ("one_message", "one_message_decoding")
KINDS = ("carried", "checked", "steps")
WITH_READS = "shm"  # `tcp` simulates the network between hosts, without cross-memory reads
SHAPES = ((64, 1 << 20), (63, 737_280))  # the second: 1,000 tokens of the demo model in fp32
IDLE_S = 3.0

# --- measurements, by workers 1 and 2 together ---------------------------------------------------


def idle(
    comm: Any, ends: dict[str, Transport], num_blocks: int, block_bytes: int, repeats: int
) -> dict[str, Any]:
    """All competitors while the destination is idle. Returns the results at worker 1."""
    arena = HostArena(num_blocks, block_bytes)
    block_ids = random.Random(0).sample(range(num_blocks), num_blocks)
    for end in ends.values():
        end.attach(arena)
    took: dict[str, list[float]] = {kind: [] for kind in ("one_message", *ends)}
    for _ in range(repeats + 2):
        took["one_message"].append(one_message(comm, arena))
        for kind, end in ends.items():
            seconds = send(end, num_blocks) if comm.rank == 1 else accept(end, block_ids)
            took[kind].append(seconds)
    for end in ends.values():
        end.attach(None)
    if comm.rank != 1:
        return {}
    medians = {kind: statistics.median(each[2:]) for kind, each in took.items()}
    return {
        "blocks": num_blocks,
        "block_bytes": block_bytes,
        "GBps": {k: round(num_blocks * block_bytes / s / 1e9, 3) for k, s in medians.items()},
        "of_one_message": {
            k: round(medians["one_message"] / medians[k], 3) for k in medians if k in ends
        },
        "checksums_cost": round(medians["checked"] / medians["carried"] - 1, 3),
    }


@dataclass
class DecodingTimes:
    """Of each competitor; `took` is measured by the sender, the rest by the destination."""

    took: dict[str, list[float]]  # seconds per transfer
    slower: dict[str, list[float]]  # relative slowdown of decode steps during transfers
    moving: dict[str, list[float]]  # seconds per transfer, from header to last block
    step_s: float = 0.0  # of a decode step without transfers


def decoding(comm: Any, ends: dict[str, Transport], repeats: int) -> dict[str, Any]:
    """Transfers into a worker that decodes. Returns the results at worker 1."""
    decoder = Decoder(num_threads=1) if ends["carried"].worker == 2 else None
    if decoder is not None:
        arena = decoder.executor.arena
        comm.send(arena.block_bytes, 1)
    else:
        arena = HostArena(FREE_BLOCKS, comm.recv(source=2))
    for end in ends.values():
        end.attach(arena)
    times = measure_decoding(comm, ends, arena.block_bytes, decoder, repeats)
    for end in ends.values():
        end.attach(None)
    if decoder is not None:
        medians = [
            {kind: statistics.median(values) for kind, values in each.items()}
            for each in (times.slower, times.moving)
        ]
        comm.send((*medians, times.step_s), 1)
        return {}
    slower, moving_s, step_s = comm.recv(source=2)
    seconds = {kind: statistics.median(each) for kind, each in times.took.items()}
    num_bytes = FREE_BLOCKS * arena.block_bytes
    return {
        "requests": REQUESTS,
        "step_ms": round(step_s * 1e3, 2),
        "GBps": {k: round(num_bytes / s / 1e9, 3) for k, s in seconds.items()},
        **relative(seconds, moving_s),
        "decode_slower": {k: round(v, 3) for k, v in slower.items()},
    }


def measure_decoding(
    comm: Any,
    ends: dict[str, Transport],
    block_bytes: int,
    decoder: Decoder | None,
    repeats: int,
) -> DecodingTimes:
    """All competitors; `decoder`: at the destination."""
    times = DecodingTimes(
        {kind: [] for kind in (*BARS, *ends)},
        {kind: [] for kind in ends},
        {kind: [] for kind in ends},
    )
    whole = HostArena(FREE_BLOCKS, block_bytes)
    step = decoder.step if decoder is not None else None
    for _ in range(repeats):
        times.took["one_message"].append(one_message(comm, whole))
        times.took["one_message_decoding"] += [
            one_message_during(comm, whole, step) for _ in range(5)
        ]
        for kind, end in ends.items():
            if decoder is None:
                receive(end)  # the destination is ready
                times.took[kind] += [send(end, FREE_BLOCKS) for _ in range(5)]
                continue
            times.step_s = decoder.mean_s(end, 10)
            end.send(1, Cancel(0, "gone"))
            decoder.steps.clear()
            times.moving[kind] += [accept(end, decoder.free_blocks, decoder.step) for _ in range(5)]
            times.slower[kind].append(statistics.mean(decoder.steps) / times.step_s - 1)
    return times


def relative(seconds: dict[str, float], moving_s: dict[str, float]) -> dict[str, dict[str, float]]:
    """Bandwidths relative to one large message, while the destination is idle or decodes."""
    idle_s, decoding_s = seconds["one_message"], seconds["one_message_decoding"]
    ends = [kind for kind in seconds if kind not in BARS]
    return {
        "of_one_message_idle": {k: round(idle_s / seconds[k], 3) for k in (BARS[1], *ends)},
        "of_one_message_decoding": {k: round(decoding_s / seconds[k], 3) for k in ends},
        # From header to last block: without the waits for the ends of two steps.
        "moving_of_one_message_idle": {k: round(idle_s / moving_s[k], 3) for k in ends},
        "moving_of_one_message_decoding": {k: round(decoding_s / moving_s[k], 3) for k in ends},
    }


def round_trips(transport: Transport, pause_s: float, repeats: int) -> dict[str, float]:
    """Round trips of small messages, in µs; a pause before each lets the other worker sleep."""
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
    """Share of one core that this rank uses while it is idle."""
    used_s, stop_s = time.process_time(), time.monotonic() + IDLE_S
    while time.monotonic() < stop_s:
        transport.poll()
        transport.progress()
        transport.wait(1.0)
    return (time.process_time() - used_s) / IDLE_S


# --- a job ---------------------------------------------------------------------------------------


def inside(link: str, repeats: int, output: Path) -> None:
    """One rank of a job; worker 1 writes the results to `output`."""
    from mpi4py import MPI

    from mellmpi.transport.mpi import MpiJob

    job, comm = MpiJob(), MPI.COMM_WORLD
    ends = {
        kind: job.connect(
            0.005,
            checksums="always" if kind == "checked" else "never",
            progress_thread=kind != "steps",
            cross_memory=link == WITH_READS and kind != "messages",
        )
        for kind in (*KINDS, *(["messages"] if link == WITH_READS else []))
    }
    end, results = ends["carried"], {}
    if end.worker in (1, 2):
        results = {
            "idle": [idle(comm, ends, *shape, repeats) for shape in SHAPES],
            "decoding": decoding(comm, ends, repeats // 4),
            "round_trip_busy_us": round_trips(end, 0.0, 2000),
            "round_trip_after_pause_us": round_trips(end, 0.005, 200),
            "empty_poll_us": poll_us(end),
        }
    if end.worker == 1:
        for other in (0, 3):
            end.send(other, Stop())
    elif end.worker in (0, 3):
        receive(end)
    comm.Barrier()
    shares = comm.gather(idle_cpu(end), 1)
    if end.worker == 1:
        results["idle_cpu_share_of_one_core"] = round(sum(shares), 4)
        output.write_text(json.dumps(results))
    for other in ends.values():
        other.close()
    job.finish()


def run(link: str, repeats: int) -> dict[str, Any]:
    """Run a job on this link. Returns its results."""
    launcher = ["mpirun", "--allow-run-as-root", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    if link == "10gbit":
        subprocess.run([HERE / "two_hosts.sh", "up", link], check=True)
        launcher = [str(HERE / "two_hosts.sh"), "mpirun"]
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        program = [sys.executable, __file__, "--links", link, "--repeats", str(repeats)]
        program += ["--inside", output.name]
        try:
            subprocess.run(
                [*launcher, *OB1, *LINKS[link], "-n", "4", *program],
                check=True,
                timeout=300,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            return json.loads(output.read())
        finally:
            if link == "10gbit":
                subprocess.run([HERE / "two_hosts.sh", "down"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    add_json_option(parser)
    args = parser.parse_args()
    if args.inside:
        return inside(args.links[0], args.repeats, args.inside)
    results = {link: run(link, args.repeats) for link in args.links}
    config = {"repeats": args.repeats, "load_average": round(os.getloadavg()[0], 2)}
    finish(config, results, args.json)


if __name__ == "__main__":
    main()
