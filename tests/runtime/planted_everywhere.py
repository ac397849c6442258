"""Plants an error in every call of start, run and end, on ranks 0, 1 and 3 of 4.

`python -m tests.runtime.planted_everywhere [plain]`; plain: without ULFM.
"""

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.mpi import harness, planted
from tests.runtime.jobs import line

NUM_RANKS, NUM_REQUESTS, LIMIT_S = 4, 6, 10.0


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
            if nth == 1 or site in planted.REPEATED:
                yield Case(site, when, nth, rank)


@dataclass(frozen=True)
class Seen:
    """The end of a job."""

    code: int | None  # of mpirun; None: it did not end
    left: int  # ranks that still run
    tracebacks: int
    output: str
    late_s: float | None  # from the error to the end of the last rank; None: no error was raised
    answers: int

    @property
    def well(self) -> bool:
        """Whether all ranks ended in time, and the exit code is right."""
        if self.late_s is None:
            return self.code == 0 and self.answers == NUM_REQUESTS
        return self.code is not None and not self.left and self.late_s <= LIMIT_S


def run(case: Case, directory: Path, flags: list[str]) -> Seen:
    requests = [line(f"r{i}", prompt=[5 + i], max_tokens=4) for i in range(NUM_REQUESTS)]
    (directory / "in.jsonl").write_text("\n".join(requests))
    outcome = harness.run_job(
        NUM_RANKS,
        "tests.mpi.planted",
        case.site,
        case.when,
        str(case.nth),
        str(case.rank),
        directory=directory,
        limit_s=60,
        flags=flags,
    )
    stop_s = time.monotonic() + LIMIT_S
    while left(directory) and time.monotonic() < stop_s:
        time.sleep(0.05)
    planted_s, out = directory / "planted", directory / "out.jsonl"
    late_s = time.time() - float(planted_s.read_text()) if planted_s.exists() else None
    return Seen(
        outcome.returncode,
        left(directory),
        outcome.output.count("Traceback"),
        outcome.output,
        late_s,
        out.read_text().count("\n") if out.exists() else 0,
    )


def left(directory: Path) -> int:
    """Return the number of ranks that still run."""
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
        bad += not seen.well
        row = {
            **asdict(case),
            "code": seen.code,
            "left": seen.left,
            "tracebacks": seen.tracebacks,
            "answers": seen.answers,
            "s": seen.late_s,
        }
        print("ok" if seen.well else "WRONG", json.dumps(row), flush=True)
        if not seen.well:
            print(seen.output, flush=True)
    print(f"{total} errors planted, {bad} jobs did not end well")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
