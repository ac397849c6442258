"""Clients that leave: `python -m tests.api_server.disconnects [N]` (10,000).

Each begins an answer over a connection of its own, streaming or not, and closes it at a random
moment: while queued, before the first token, between tokens. Prints how long the scheduler took to
hear of it, and what is left at the end: no request, no call, and no memory that grows.
"""

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from mellmpi.models.random_model import write_byte_tokenizer
from tests.api_server.serving_cell import ServingCell

CONCURRENT = 20


def resident_mb(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


class Leavers:
    """Clients that leave; `left` has the time at which each has closed its connection."""

    def __init__(self, port, seed=0):
        self._port, self._rng = port, random.Random(seed)
        self.left = {}  # number of the client -> time

    async def leave(self, number):
        """Ask, wait a random time, close. The prompt tells the number of the client."""
        digits = [40 + int(digit) for digit in f"{number:06d}"]
        stream = self._rng.random() < 0.7
        body = json.dumps({"prompt": digits, "max_tokens": 5000, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(head.encode() + body)
        await asyncio.sleep(self._rng.choice((0.0, 0.05, 0.2, 0.5)) * self._rng.random())
        writer.transport.abort() if self._rng.random() < 0.5 else writer.close()
        self.left[number] = time.perf_counter()

    async def run(self, numbers):
        limit = asyncio.Semaphore(CONCURRENT)

        async def one(number):
            async with limit:
                await self.leave(number)

        await asyncio.gather(*(one(number) for number in numbers))


class Hearing(ServingCell):
    """A cell that notes when a request has been cancelled, by the number in its prompt."""

    def __init__(self, directory):
        super().__init__(directory, token_s=0.002)
        self.heard, self.numbers, self.last_s = {}, {}, 0.0

    def wait_quiet(self):
        """Wait until nothing has come from the API server for a second."""
        while time.perf_counter() - self.last_s < 1.0:
            time.sleep(0.05)

    def _handle(self, event):
        self.last_s = time.perf_counter()
        if (request := getattr(event, "request", None)) is not None:
            self.numbers[request.id] = int("".join(str(t - 40) for t in request.prompt))
        elif hasattr(event, "reason"):
            self.heard[self.numbers[event.request_id]] = time.perf_counter()
        super()._handle(event)


def run(count):
    """Return seconds from leaving to the scheduler's knowledge, and growth of memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        write_byte_tokenizer(512, Path(folder))
        with Hearing(folder) as cell:
            leavers = Leavers(int(cell.url.rpartition(":")[2]))
            asyncio.run(leavers.run(range(count // 4)))
            before_mb = resident_mb(cell.server.process.pid)
            asyncio.run(leavers.run(range(count // 4, count)))
            cell.wait_quiet()
            assert not cell.open, f"{len(cell.open)} requests are left"
            assert cell.front._calls.num_open == 0
            grown_mb = resident_mb(cell.server.process.pid) - before_mb
            return [max(0.0, cell.heard[n] - leavers.left[n]) for n in cell.heard], grown_mb


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    delays, grown_mb = run(count)
    p99 = statistics.quantiles(delays, n=100)[98]
    print(
        f"{count} clients left, {len(delays)} during their answer: cancelled after "
        f"{1e3 * statistics.median(delays):.1f} ms (median), {1e3 * p99:.0f} ms (p99), "
        f"{1e3 * max(delays):.0f} ms (most); the API server grew by {grown_mb:.1f} MB"
    )


if __name__ == "__main__":
    main()
