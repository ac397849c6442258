"""What a peer does for bench/engine_speed.py: load once, then answer one load a line of stdin.

in    {"prompts": [[token id, …], …], "num_out": 128}
out   {"ready": version} once, then for each load {"outputs": [[token id, …], …], "seconds",
      "cpu_seconds", "memory_mb"}: seconds from handing over all prompts to having all outputs.

Standard library only: vLLM's environment has nothing of ours.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Say = Callable[[dict[str, Any]], None]
Run = Callable[[list[list[int]], int], list[list[int]]]


def channel() -> Say:
    """The way to the parent. Call it first: from now on prints of libraries go to stderr."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda message: print(json.dumps(message), file=out)


def answer(say: Say, version: str, run: Run) -> None:
    """Say that all is loaded, then time `run` on every load until stdin closes."""
    say({"ready": version})
    for line in sys.stdin:
        load = json.loads(line)
        start_s, start_cpu_s = time.perf_counter(), _cpu_seconds()
        outputs = run(load["prompts"], load["num_out"])
        say(
            {
                "outputs": outputs,
                "seconds": time.perf_counter() - start_s,
                "cpu_seconds": _cpu_seconds() - start_cpu_s,
                "memory_mb": _memory_mb(),
            }
        )


def _processes() -> list[str]:
    """This one and a server it has started."""
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
    """The largest resident size that one of them has had."""
    peaks_kib = []
    for process in _processes():
        with open(f"/proc/{process}/status") as status:
            peaks_kib += [int(line.split()[1]) for line in status if line.startswith("VmHWM")]
    return max(peaks_kib) // 1024
