"""Runs a command with a time limit, and then ends all processes that it started, as MPI jobs."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def within(limit_s: float, command: list[str]) -> tuple[str, str, int | None]:
    """Run a command. Returns (stdout, stderr, exit code); the code is None after a timeout."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        job = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        )
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = job.wait(limit_s)
        end(job)
        out.seek(0)
        err.seek(0)
        return out.read(), err.read(), code


def end(job: "subprocess.Popen[str]", patience_s: float = 15) -> None:
    """End the process group of a job. It includes mpirun, which ends its ranks."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGTERM)
        stop_s = time.monotonic() + patience_s
        while time.monotonic() < stop_s:
            job.poll()  # a zombie would stay in its process group
            os.killpg(job.pid, 0)
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()
