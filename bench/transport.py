"""What do messages and transfers cost, idle and while the destination decodes, on three links?

    python bench/transport.py [--links shm tcp 10gbit] [--json FILE]

Each link is a job of 4 ranks: worker 1 sends to worker 2; the others sleep, as in a cluster with
little to do. `10gbit` needs root: it makes two hosts of network namespaces (bench/two_hosts.sh).
Transfers are timed at the sender, from the first call to the receiver's answer. Competitors
alternate in the same job:

one_message  one MPI_Send of as many bytes, in one piece
carried      as in the runtime, moved by a thread of its own: within a host the receiver reads the
             blocks out of the sender's memory, else there is one message a block
checked      the same, with a checksum a block
steps        without the thread: moved between decode steps
messages     only on shm: one message a block there, too

one_message_decoding is what this machine leaves while its cores decode, too: the one large message,
received by a second thread of the destination while the first makes the same steps. It waits for no
end of a step, so what to compare is `moving_of_one_message_decoding`.
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
from pathlib import Path
from typing import Any

from record import add_json_option, finish
from transfers import accept, one_message, one_message_beside, receive, send

from mellmpi.protocol import Cancel, Chunk, Sampling, StepPlan, Stop
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
READING = "shm"  # `tcp` stands for the network between hosts, and sends
SHAPES = ((64, 1 << 20), (63, 737_280))  # the second: 1,000 tokens of the demo model in fp32
REQUESTS, CONTEXT = 8, 500  # decoded by the destination meanwhile
DECODE_BLOCKS = 200  # moved then: 73 MB, 3,200 tokens of the demo model in bf16
IDLE_S = 3.0

# --- measurements, at worker 1 with worker 2 in step ---------------------------------------------


def idle(
    comm: Any, ends: dict[str, Transport], num_blocks: int, block_bytes: int, repeats: int
) -> dict[str, Any]:
    """All competitors while nobody computes."""
    arena = HostArena(num_blocks, block_bytes)
    places = random.Random(0).sample(range(num_blocks), num_blocks)
    for end in ends.values():
        end.attach(arena)
    took: dict[str, list[float]] = {kind: [] for kind in ("one_message", *ends)}
    for _ in range(repeats + 2):
        took["one_message"].append(one_message(comm, arena))
        for kind, end in ends.items():
            run = send(end, num_blocks) if comm.rank == 1 else accept(end, places)
            took[kind].append(run)
    for end in ends.values():
        end.attach(None)
    if comm.rank != 1:
        return {}
    seconds = {kind: statistics.median(each[2:]) for kind, each in took.items()}
    return {
        "blocks": num_blocks,
        "block_bytes": block_bytes,
        "GBps": {k: round(num_blocks * block_bytes / s / 1e9, 3) for k, s in seconds.items()},
        "of_one_message": {
            k: round(seconds["one_message"] / seconds[k], 3) for k in seconds if k in ends
        },
        "checksums_cost": round(seconds["checked"] / seconds["carried"] - 1, 3),
    }


class Decoder:
    """Eight requests of the demo model, decoded at the same place again and again."""

    def __init__(self, num_threads: int):
        from mellmpi.config import CacheConfig, ModelConfig
        from mellmpi.engine import build_executor
        from mellmpi.models import resolve

        directory = resolve("smollm2", Path.home() / ".cache" / "mellmpi")
        self.executor = build_executor(
            directory,
            ModelConfig(model="smollm2"),
            CacheConfig(kv_cache_memory_bytes=512 << 20),
            device="cpu",
            num_threads=num_threads,
        )
        greedy = Sampling(999, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, (), None)
        used = -(-CONTEXT // 16)
        self.plan = StepPlan(
            self.executor.models[0].kv.model,
            tuple(
                Chunk(
                    i,
                    CONTEXT - 1,
                    (100 + i,),
                    list(range(i * used, (i + 1) * used)),
                    greedy,
                    ((1,), []),
                )
                for i in range(REQUESTS)
            ),
            (),
        )
        self.places = list(range(REQUESTS * used, REQUESTS * used + DECODE_BLOCKS))
        self.steps: list[float] = []

    def step(self) -> bool:
        started_s = time.perf_counter()
        self.executor.execute(self.plan)
        self.steps.append(time.perf_counter() - started_s)
        return True

    def mean_s(self, transport: Transport, num_steps: int) -> float:
        """Of some steps in the loop of a worker to whom nothing happens."""
        self.steps.clear()
        for _ in range(num_steps):
            transport.poll()
            transport.progress()
            self.step()
        return statistics.mean(self.steps)


def decoding(comm: Any, ends: dict[str, Transport], repeats: int) -> dict[str, Any]:
    """Transfers into a worker that decodes; `slower`: its steps while one follows the other."""
    decoder = Decoder(num_threads=1) if ends["carried"].worker == 2 else None
    if decoder is not None:
        arena = decoder.executor.arena
        comm.send(arena.block_bytes, 1)
    else:
        arena = HostArena(DECODE_BLOCKS, comm.recv(source=2))
    took: dict[str, list[float]] = {kind: [] for kind in (*BARS, *ends)}
    slower: dict[str, list[float]] = {kind: [] for kind in ends}
    moving: dict[str, list[float]] = {kind: [] for kind in ends}
    whole = HostArena(DECODE_BLOCKS, arena.block_bytes)
    for end in ends.values():
        end.attach(arena)
    for _ in range(repeats):
        took["one_message"].append(one_message(comm, whole))
        step = decoder.step if decoder is not None else None
        took["one_message_decoding"] += [one_message_beside(comm, whole, step) for _ in range(5)]
        for kind, end in ends.items():
            if decoder is None:
                receive(end)  # ready
                took[kind] += [send(end, DECODE_BLOCKS) for _ in range(5)]
                continue
            alone_s = decoder.mean_s(end, 10)
            end.send(1, Cancel(0, "gone"))
            decoder.steps.clear()
            moving[kind] += [accept(end, decoder.places, decoder.step) for _ in range(5)]
            slower[kind].append(statistics.mean(decoder.steps) / alone_s - 1)
    for end in ends.values():
        end.attach(None)
    if decoder is not None:
        medians = [{k: statistics.median(v) for k, v in each.items()} for each in (slower, moving)]
        comm.send((*medians, alone_s), 1)
        return {}
    slow, moving_s, step_s = comm.recv(source=2)
    seconds = {kind: statistics.median(each) for kind, each in took.items()}
    num_bytes = DECODE_BLOCKS * arena.block_bytes
    return {
        "requests": REQUESTS,
        "step_ms": round(step_s * 1e3, 2),
        "GBps": {k: round(num_bytes / s / 1e9, 3) for k, s in seconds.items()},
        "of_one_message_idle": {
            k: round(seconds["one_message"] / seconds[k], 3) for k in (BARS[1], *ends)
        },
        "of_one_message_decoding": {
            k: round(seconds["one_message_decoding"] / seconds[k], 3) for k in ends
        },
        # From header to last block: without the waits for the ends of two steps.
        "moving_of_one_message_idle": {
            k: round(seconds["one_message"] / moving_s[k], 3) for k in ends
        },
        "moving_of_one_message_decoding": {
            k: round(seconds["one_message_decoding"] / moving_s[k], 3) for k in ends
        },
        "decode_slower": {k: round(v, 3) for k, v in slow.items()},
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
    used_s, stop_s = time.process_time(), time.monotonic() + IDLE_S
    while time.monotonic() < stop_s:
        transport.poll()
        transport.progress()
        transport.wait(1.0)
    return (time.process_time() - used_s) / IDLE_S


# --- a job ---------------------------------------------------------------------------------------


def inside(link: str, repeats: int, output: Path) -> None:
    """One rank of a job; worker 1 writes what was found."""
    from mpi4py import MPI

    from mellmpi.transport.mpi import MpiJob

    job, comm = MpiJob(), MPI.COMM_WORLD
    ends = {
        kind: job.connect(
            0.005,
            checksums="always" if kind == "checked" else "never",
            carried=kind != "steps",
            reading=link == READING and kind != "messages",
        )
        for kind in (*KINDS, *(["messages"] if link == READING else []))
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
    """A job on this link."""
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
