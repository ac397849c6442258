"""Errors planted in every call of start, run and end, on ranks 0, 1 and the last of 4.

`python -m tests.runtime.planted_everywhere [plain]`; plain: without ULFM.
"""

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.mpi import harness, planted
from tests.runtime.jobs import line

NUM_RANKS, LIMIT_S = 4, 10.0


@dataclass(frozen=True)
class Case:
    """One planted error."""

    site: str
    when: str  # "before" or "after" the call does its work
    nth: int
    rank: int


def cases() -> Iterator[Case]:
    for rank, when, nth in itertools.product((0, 1, NUM_RANKS - 1), ("before", "after"), (1, 3)):
        for site in planted.sites(rank):
            yield Case(site, when, nth, rank)


@dataclass(frozen=True)
class Seen:
    """What became of a job."""

    code: int | None  # of mpirun; None: it did not end
    left: int  # ranks that are still there
    tracebacks: int
    output: str
    wall_s: float
    answers: int


def run(case: Case, directory: Path, flags: list[str]) -> Seen:
    requests = [line(f"r{i}", prompt=[5 + i], max_tokens=4) for i in range(6)]
    (directory / "in.jsonl").write_text("\n".join(requests))
    started_s = time.monotonic()
    outcome = harness.run_job(
        NUM_RANKS, "tests.mpi.planted", case.site, case.when, str(case.nth), str(case.rank),
        directory=directory, limit_s=LIMIT_S + 5, flags=flags,
    )  # fmt: skip
    while left(directory) and time.monotonic() < started_s + LIMIT_S:
        time.sleep(0.05)
    wall_s = time.monotonic() - started_s
    out = directory / "out.jsonl"
    return Seen(
        outcome.returncode, left(directory), outcome.output.count("Traceback"), outcome.output,
        wall_s, out.read_text().count("\n") if out.exists() else 0,
    )  # fmt: skip


def left(directory: Path) -> int:
    """Ranks of the job that still run."""
    return sum(_runs(int(file.read_text())) for file in directory.glob("*.pid"))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    flags = harness.WITHOUT_ULFM if "plain" in sys.argv else harness.FLAGS
    bad = total = 0
    for case in cases():
        with tempfile.TemporaryDirectory() as name:
            seen = run(case, Path(name), flags)
        total += 1
        wrong = seen.code is None or seen.left or seen.wall_s > LIMIT_S
        bad += bool(wrong)
        row = {**case.__dict__, "code": seen.code, "left": seen.left, "tracebacks":
               seen.tracebacks, "answers": seen.answers, "s": round(seen.wall_s, 1)}  # fmt: skip
        print("WRONG" if wrong else "ok", json.dumps(row), flush=True)
        if wrong:
            print(seen.output, flush=True)
    print(f"{total} errors planted, {bad} jobs did not end well")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
