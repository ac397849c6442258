"""Complete runs with pipes, gzip files, full disks and failing batches."""

import gzip
import json
import os
import shlex
import subprocess
import sys

import pytest

from tests.mpi.harness import FLAGS, ROOT, mpirun
from tests.runtime.jobs import TINY, Run, line

REQUESTS = "".join(line(name, prompt=[5, 6, 7], max_tokens=3) + "\n" for name in "abc")
sizes = pytest.mark.parametrize("num_ranks", [1, 3])


@pytest.fixture
def place(tmp_path):
    (tmp_path / "in").write_text(REQUESTS)
    (tmp_path / "gz").write_bytes(gzip.compress(REQUESTS.encode()))
    return tmp_path


def shell(place, num_ranks, command):
    """Run a line of bash in which `mellmpi` is the program. Returns (exit code, out, err)."""
    launcher = [mpirun(), *FLAGS, "-n", str(num_ranks)] if num_ranks > 1 else []
    words = shlex.join([*launcher, sys.executable, "-m", "mellmpi"])
    done = subprocess.run(
        ["bash", "-c", f'mellmpi() {{ {words} "$@" {shlex.join(TINY)}; }}; {command}'],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
    )
    return done.returncode, done.stdout, done.stderr


def answered(path):
    return sorted(json.loads(text)["custom_id"] for text in path.read_text().splitlines())


@sizes
@pytest.mark.parametrize(
    "command",
    [
        "mellmpi run-batch -i <(cat in) -o out",
        "mkfifo p; cat gz > p & mellmpi run-batch -i p -o out",
        "cat gz | mellmpi run-batch -i /dev/stdin -o out",
        "mellmpi run-batch -i gz -o /dev/stdout > out",
        "mellmpi run-batch -i in -o >(cat > out); code=$?; wait $!; exit $code",
    ],
)
def test_pipes_of_every_kind_are_read_and_written(place, num_ranks, command):
    code, _, err = shell(place, num_ranks, command)
    assert code == 0, err
    assert answered(place / "out") == ["a", "b", "c"]


@sizes
def test_a_truncated_gzip_pipe_is_reported_and_the_requests_before_are_answered(place, num_ranks):
    first = line("first", prompt=[5], max_tokens=2).encode() + b"\n"
    packed = gzip.compress(first) + gzip.compress(os.urandom(2000).hex().encode())
    (place / "cut").write_bytes(packed[:-9])
    code, _, err = shell(place, num_ranks, "cat cut | mellmpi run-batch -i - -o out")
    assert code != 0 and err.count("in the middle of its gzip data") == 1
    assert answered(place / "out") == ["first"]


@sizes
def test_a_full_disk_ends_a_batch_with_one_line_and_code_1(place, num_ranks):
    code, _, err = shell(place, num_ranks, "mellmpi run-batch -i in -o /dev/full --report r")
    assert code == 1 and err.count("-o /dev/full cannot be written: No space left on device") == 1
    assert "Traceback" not in err and (place / "r").exists()


def test_a_failed_report_affects_neither_answers_nor_picture(place):
    files = "-o out --report /dev/full --timeline t.svg"
    code, _, err = shell(place, 1, f"mellmpi run-batch -i in {files}")
    assert code == 1 and err.count("--report /dev/full cannot be written") == 1
    assert answered(place / "out") == ["a", "b", "c"] and "<svg" in (place / "t.svg").read_text()


def test_a_failed_trace_affects_neither_answers_nor_report(place):
    files = "-o out --report r --trace-out /dev/full"
    code, _, err = shell(place, 1, f"mellmpi run-batch -i in {files}")
    assert code == 1 and err.count("--trace-out /dev/full cannot be written") == 1
    assert answered(place / "out") == ["a", "b", "c"] and (place / "r").read_text()


@sizes
def test_a_trace_shows_every_request_and_the_steps_of_workers(place, num_ranks):
    code, _, err = shell(place, num_ranks, "mellmpi run-batch -i in -o out --trace-out t.json")
    assert code == 0 and "trace: t.json" in err
    events = json.loads((place / "t.json").read_text())
    ends = [e for e in events if e["ph"] == "e" and e["cat"] == "request"]
    assert [e["args"]["finish_reason"] for e in ends] == ["length"] * 3
    stepped = {e["pid"] for e in events if e["ph"] == "X"}
    assert stepped and stepped <= set(range(1, max(2, num_ranks)))


@sizes
def test_a_batch_whose_lines_all_fail_has_code_1_and_names_the_reason(place, num_ranks):
    bad = line("x", prompt="x", model="other") + "\n" + line("y", prompt="x", model="other")
    (place / "in").write_text(f"garbage\n{bad}\n")
    code, _, err = shell(place, num_ranks, "mellmpi run-batch -i in -o out")
    assert code == 1 and "none of the 3 lines could be answered" in err
    assert "the most frequent reason (2 lines)" in err
    assert "the model 'other' does not exist" in err.splitlines()[-1]


def test_lines_of_an_earlier_run_count_as_answered(place):
    first = Run(
        1, "run-batch", "-i", str(place / "in"), "-o", str(place / "out"), *TINY, directory=place
    ).wait()
    with (place / "in").open("a") as stream:
        stream.write("garbage\n")
    code, _, err = shell(place, 1, "mellmpi run-batch -i in -o out")
    assert (first.code, code) == (0, 0), err


def test_an_empty_input_is_reported(place):
    code, _, err = shell(place, 1, "mellmpi run-batch -i /dev/null -o out")
    assert code == 0 and "there were no requests in the input" in err


def test_closed_standard_streams_change_no_answer(place):
    code, _, _ = shell(place, 1, "mellmpi run-batch -i in -o out --show 3 <&- >&- 2>&-")
    assert code == 0 and answered(place / "out") == ["a", "b", "c"]
    code, _, err = shell(place, 1, "mellmpi run-batch -i in -o - >&-")
    assert code == 2 and "standard output is closed" in err
