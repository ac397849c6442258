"""The protocol of peers of bench/engine_speed.py: load once, then answer one batch a line of stdin.

in    {"prompts": [[token id, …], …], "num_out": 128}
out   {"ready": version} once, then for each batch {"outputs": [[token id, …], …], "seconds",
      "cpu_seconds", "memory_mb"}: seconds from the submission of all prompts to all outputs.

Standard library only, because vLLM's environment does not contain mellmpi.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Send = Callable[[dict[str, Any]], None]
Run = Callable[[list[list[int]], int], list[list[int]]]


def channel() -> Send:
    """A function that sends a message to the parent; then redirects stdout to stderr.

    Call it first, so that prints of libraries do not mix with messages.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda message: print(json.dumps(message), file=out)


def answer(send: Send, version: str, run: Run) -> None:
    """Send the ready message, then time `run` on every batch until stdin closes."""
    send({"ready": version})
    for line in sys.stdin:
        batch = json.loads(line)
        start_s, start_cpu_s = time.perf_counter(), _cpu_seconds()
        outputs = run(batch["prompts"], batch["num_out"])
        send(
            {
                "outputs": outputs,
                "seconds": time.perf_counter() - start_s,
                "cpu_seconds": _cpu_seconds() - start_cpu_s,
                "memory_mb": _memory_mb(),
            }
        )


def _processes() -> list[str]:
    """This process and the server that it has started."""
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        return ["self", *children.read().split()]


def _cpu_seconds() -> float:
    ticks = 0
    for process in _processes():
        with open(f"/proc/{process}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # user, system
    return ticks / os.sysconf("SC_CLK_TCK")


def _memory_mb() -> int:
    """The peak resident size of the largest of these processes."""
    peaks_kib = []
    for process in _processes():
        with open(f"/proc/{process}/status") as status:
            peaks_kib += [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    return max(peaks_kib) // 1024
