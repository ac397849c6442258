"""What do HTTP streams cost: CPU of rank 0 and of the API server, latency of a token?

    python bench/http_streams.py [--streams 500] [--rate 20000] [--seconds 20] [--json FILE]

A fake executor emits the tokens: one per stream and step, as workers report them. CPU time of the
process is measured, so that other load on the machine matters little; the latency of a token is the
time from its `Emit` to its arrival at a client in another process.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import add_json_option, finish

from mellmpi.config import HttpConfig
from mellmpi.models.random_model import write_byte_tokenizer
from mellmpi.protocol import Cancel, Emit, ModelFiles, ModelLimits, StartServer, Submit
from mellmpi.runtime.serving.front import HttpFront
from mellmpi.runtime.serving.listener import listen, url_of
from mellmpi.runtime.serving.process import ApiServer
from mellmpi.runtime.serving.settings import Settings

WARM_S = 3.0
ID = re.compile(rb"^id: (\d+)$", re.M)
TICK = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def resident_mb(pid: int) -> float:
    """Memory of a process in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


# --- the client ----------------------------------------------------------------------------------


async def read_stream(host: str, port: int, number: int, log: list[tuple[int, int, float]]) -> None:
    """Read one stream to its end; log (stream, tokens so far, time) of each read."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    body = json.dumps(
        {
            "prompt": [40 + number % 50, 40 + number // 50],
            "max_tokens": 100_000,
            "stream": True,
            "user": "x",
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    while data := await reader.read(1 << 16):
        now = time.perf_counter()
        if found := ID.findall(data):
            log.append((number, int(found[-1]), now))


async def read_all(port: int, streams: int, seconds: float, file: str) -> None:
    """Read all streams for some seconds; write the log."""
    log: list[tuple[int, int, float]] = []
    tasks = [asyncio.create_task(read_stream("127.0.0.1", port, n, log)) for n in range(streams)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    Path(file).write_text(json.dumps(log))


# --- rank 0 --------------------------------------------------------------------------------------


class Executor:
    """Emits one token per open request and step, through the front."""

    def __init__(self, front: HttpFront, num_workers: int, step_s: float):
        self._front, self._step_s = front, step_s
        self._open: list[list[Any]] = []  # [request id, number of tokens, prompt]
        self._groups = num_workers
        self.emitted: dict[int, list[float]] = {}  # request id -> time of each token
        self.requests: dict[int, int] = {}  # number of the stream -> request id
        self.front_s = 0.0

    def run(self, seconds: float, on_warm: Any) -> None:
        """Drive the front; workers report one after the other within a step."""
        start_s = next_s = time.perf_counter()
        group, warm = 0, False
        while (now := time.perf_counter()) < start_s + seconds:
            if not warm and now > start_s + WARM_S:
                warm = True
                self.front_s = 0.0
                on_warm()
            self._front_inbox(now)
            if now < next_s:
                time.sleep(min(0.001, next_s - now))
                continue
            self._step(group)
            group = (group + 1) % self._groups
            next_s += self._step_s / self._groups

    def _front_inbox(self, now: float) -> None:
        began_s = time.thread_time()
        events = self._front.inbox(now)
        self.front_s += time.thread_time() - began_s
        for event in events:
            if isinstance(event, Submit):
                request = event.request
                self._open.append([request.id, 0, request.prompt[0]])
                self.emitted[request.id] = []
                low, high = request.prompt
                self.requests[low - 40 + 50 * (high - 40)] = request.id
            elif isinstance(event, Cancel):
                self._open = [row for row in self._open if row[0] != event.request_id]

    def _step(self, group: int) -> None:
        now = time.perf_counter()
        emits = []
        for row in self._open[group :: self._groups]:
            emits.append(Emit(row[0], row[1], (35 + (row[1] * 7 + row[2]) % 90,), (), None, ()))
            row[1] += 1
            self.emitted[row[0]].append(now)
        began_s = time.thread_time()
        for emit in emits:
            self._front.deliver(emit)
        self._front.flush()
        self.front_s += time.thread_time() - began_s


def measure(streams: int, rate: float, seconds: float) -> dict[str, float]:
    """Run once."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_byte_tokenizer(512, directory)
        config = HttpConfig(port=0)
        settings, listener = Settings(config), listen(config)
        server = ApiServer(listener, 0, settings.message)
        front = HttpFront(listener, [server], settings)
        front.start(StartServer((ModelFiles("tiny", folder, ""),), 0, 1))
        front.set_state("ready", "", (ModelLimits("tiny", 10**9, 512, (2,)),))
        executor = Executor(front, 8, streams / rate)
        port = url_of(listener, config).rpartition(":")[2]
        log = directory / "log.json"
        arguments = [port, str(streams), str(seconds + WARM_S), str(log)]
        client = subprocess.Popen([sys.executable, __file__, "--client", *arguments])
        marks: dict[str, float] = {}

        def on_warm() -> None:
            marks.update(cpu=cpu_s(server.process.pid), at=time.perf_counter())
            marks["mb"] = resident_mb(server.process.pid)

        executor.run(seconds + WARM_S, on_warm)
        took_s = time.perf_counter() - marks["at"]
        used_s = cpu_s(server.process.pid) - marks["cpu"]
        grown_mb = resident_mb(server.process.pid) - marks["mb"]
        client.wait()
        front.close()
        latencies, tokens, events = late(executor, json.loads(log.read_text()), marks["at"])
    return {
        "tokens_per_s": tokens / took_s,
        "events_per_s": events / took_s,
        "api_server_cores": used_s / took_s,
        "rank0_cores": executor.front_s / took_s,
        "latency_p50_ms": 1e3 * statistics.median(latencies),
        "latency_p99_ms": 1e3 * statistics.quantiles(latencies, n=100)[98],
        "api_server_grown_mb": grown_mb,
    }


def late(
    executor: Executor, log: list[tuple[int, int, float]], since_s: float
) -> tuple[list[float], int, int]:
    """Return the latency of each token in seconds, the number of tokens and of events."""
    by_number: dict[int, list[tuple[int, float]]] = {}
    for number, position, at in log:
        by_number.setdefault(number, []).append((position, at))
    latencies, tokens, events = [], 0, 0
    for number, rows in by_number.items():
        emitted, last = executor.emitted[executor.requests[number]], 0
        for position, at in rows:
            new = range(last, min(position, len(emitted)))
            last = position
            if at < since_s:
                continue
            events += 1
            tokens += len(new)
            latencies += [max(0.0, at - emitted[index]) for index in new]
    return latencies, tokens, events


def main() -> None:
    """Measure REPEATS times, and print medians."""
    if sys.argv[1:2] == ["--client"]:
        port, streams, seconds, file = sys.argv[2:]
        asyncio.run(read_all(int(port), int(streams), float(seconds), file))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--rate", type=float, default=20_000.0, help="tokens/s, all streams")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    add_json_option(parser)
    options = parser.parse_args()
    runs = [measure(options.streams, options.rate, options.seconds) for _ in range(options.repeats)]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    for name, value in medians.items():
        print(f"{name:<22} {value:>10.3f}", file=sys.stderr)
    finish(
        {k: v for k, v in vars(options).items() if k != "json"},
        {"medians": medians, "runs": runs},
        options.json,
    )


if __name__ == "__main__":
    main()
