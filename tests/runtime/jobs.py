"""Runs `python -m mellmpi` under mpirun, as a user types it, from a test."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.mpi.harness import FLAGS, ROOT, mpirun

TINY = ("--model", "random:tiny-llama", "--dtype", "float32", "--threads", "1")


STRESS = (
    "--migrate",
    "stress",
    "--policy",
    "worst_fit",
    "--rebalance-every-s",
    "0.01",
    "--max-num-batched-tokens",
    "64",
)
"""Small steps, so that there is time for many migrations."""


@dataclass(frozen=True)
class Done:
    """A finished job. `code` None: it exceeded its time limit and was killed."""

    code: int | None
    out: str
    err: str
    wall_s: float


class Run:
    """A running job, in its own session."""

    def __init__(
        self,
        num_ranks: int,
        *args: str,
        stdin=subprocess.DEVNULL,
        directory: Path,
        module: str = "mellmpi",
    ):
        self._out, self._err = directory / "stdout", directory / "stderr"
        self._started_s = time.monotonic()
        launcher = [mpirun(), *FLAGS, "-n", str(num_ranks)] if num_ranks > 1 else []
        with self._out.open("w") as out, self._err.open("w") as err:
            self.job = subprocess.Popen(
                [*launcher, sys.executable, "-m", module, *args],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=stdin,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the job, by rank."""
        found = {}
        for process in psutil.Process(self.job.pid).children(recursive=True):
            rank = process.environ().get("OMPI_COMM_WORLD_RANK")
            if rank is not None:
                found[int(rank)] = process
        return found

    def wait(self, limit_s: float = 120) -> Done:
        code: int | None = None
        try:
            code = self.job.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
        wall_s = time.monotonic() - self._started_s
        return Done(code, self._out.read_text(), self._err.read_text(), wall_s)

    def kill(self) -> None:
        """Kill mpirun and its ranks, which are in their own sessions."""
        ranks = psutil.Process(self.job.pid).children(recursive=True)
        os.killpg(self.job.pid, signal.SIGKILL)
        for rank in ranks:
            if rank.is_running():  # compares the start time, too, in case the id was reused
                rank.kill()
        self.job.wait()


def line(custom_id: str, url: str = "/v1/completions", **body) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def write_requests(path: Path, count: int, seed: int = 0, longest: int = 120) -> None:
    """Write requests that never stop early: token-id prompts, every second one sampled."""
    rng = random.Random(seed)
    lines = []
    for i in range(count):
        prompt = [rng.randrange(3, 250) for _ in range(rng.randint(5, 200))]
        sampling = {"temperature": 0.9, "top_p": 0.95, "seed": i} if i % 2 else {"temperature": 0}
        lines.append(
            line(
                f"r{i}",
                prompt=prompt,
                max_tokens=rng.randint(20, longest),
                ignore_eos=True,
                return_token_ids=True,
                **sampling,
            )
        )
    path.write_text("\n".join(lines) + "\n")


def answers(path: Path) -> dict[str, list[int]]:
    """Return custom_id -> token ids of the successful answers."""
    found = {}
    for text in path.read_text().splitlines():
        entry = json.loads(text)
        if entry["error"] is None:
            found[entry["custom_id"]] = entry["response"]["body"]["choices"][0]["token_ids"]
    return found
