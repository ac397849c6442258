"""How many events of streams can `bench serve` take on one core, and what does an event cost it?

A server in a process of its own writes prepared events, each in a chunk of its own: first as fast
as the generator reads, then at given rates. The time of the CPU depends little on what else runs on
the machine, the lag of the generator's event loop does.
"""

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import uvloop
from record import add_json_option, finish

from mellmpi.loadgen import BenchOptions
from mellmpi.loadgen.datasets import Prompt
from mellmpi.loadgen.figures import p99
from mellmpi.loadgen.session import Session

CHUNK = {
    "id": "cmpl-0123456789abcdef",
    "object": "text_completion",
    "created": 1700000000,
    "model": "fake",
    "choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": None}],
}
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
MODELS = b'{"data": [{"id": "fake"}]}'


def piece(data: bytes) -> bytes:
    """One event in one chunk of HTTP/1.1."""
    event = b"data: " + data + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


EVENT, DONE = piece(json.dumps(CHUNK).encode()), piece(b"[DONE]") + b"0\r\n\r\n"


async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer requests on one connection: `max_tokens` events, `top_k` of them a second if given."""
    while head := await reader.readuntil(b"\r\n\r\n"):
        if head.startswith(b"GET"):
            size = b"Content-Length: %d\r\n\r\n" % len(MODELS)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + size + MODELS)
            continue
        (length,) = (
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        body = json.loads(await reader.readexactly(length))
        writer.write(HEAD)
        begin_s, rate = time.perf_counter(), body.get("top_k")
        for i in range(body["max_tokens"]):
            writer.write(EVENT)
            wait_s = begin_s + (i + 1) / rate - time.perf_counter() if rate else 0.0
            await asyncio.sleep(max(0.0, wait_s))
            await writer.drain()
        writer.write(DONE)


async def served() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await stream(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def measure(port: int, streams: int, events: int, rate: int | None) -> dict[str, float]:
    """Return figures of one run; `rate` is of one stream, events/s."""
    options = BenchOptions(port=port, top_k=rate, model="fake", ignore_eos=False)
    prompts = [Prompt("a", 1, events)] * streams
    session = Session(options, prompts, np.zeros(streams), None, lambda line: None)

    async def run():
        return await session.run(asyncio.Event(), lambda run: None)

    gc.collect()
    gc.freeze()
    cpu_s = time.process_time()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(run())
    cpu_s = time.process_time() - cpu_s
    assert all(not outcome.reason for outcome in found.outcomes), found.outcomes[0].error
    total = streams * events
    return {
        "streams": streams,
        "events": total,
        "events_per_s": total / found.duration_s,
        "cpu_us_per_event": 1e6 * cpu_s / total,
        "events_per_core_s": total / cpu_s,
        "cores": cpu_s / found.duration_s,
        "p99_loop_lag_ms": 1000 * p99(found.loop_lag_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--rates", type=int, nargs="*", default=[10, 20, 40], help="of a stream")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    add_json_option(parser)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(served())
        return
    command = [sys.executable, str(Path(__file__)), "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(server.stdout.readline())
            results = {"unpaced": measure(port, args.streams, args.events, None)}
            for rate in args.rates:
                results[f"{rate}_per_stream_s"] = measure(port, args.streams, args.events, rate)
        finally:
            server.terminate()
    config = {"streams": args.streams, "events": args.events, "rates": args.rates}
    finish(config, results, args.json)


if __name__ == "__main__":
    main()
