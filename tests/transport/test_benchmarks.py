import json
import os
import subprocess
import sys

from tests.mpi.harness import FLAGS, ROOT, mpirun


def run(*command, limit_s=90, **environment):
    """Run a benchmark without a GPU."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=limit_s,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done


def bandwidth(*args):
    return run(mpirun(), *FLAGS, "-n", "2", sys.executable, "bench/bandwidth.py", *args)


def test_the_bandwidth_table_has_one_buffer_and_scattered_blocks(tmp_path):
    done = bandwidth("-m", "131072:2097152", "-i", "2", "-x", "1", "--json", str(tmp_path / "b"))
    rows = json.loads((tmp_path / "b").read_text())["results"]
    assert {row["kind"] for row in rows} == {
        "contiguous",
        "blocks of 65536",
        "blocks of 1048576",
    }
    assert all(row["MBps"] > 0 and row["latency_us"] > 0 for row in rows)
    assert "# Size      Bandwidth (MB/s)" in done.stdout


def test_the_bandwidth_benchmark_says_that_there_is_no_gpu():
    assert "no GPU" in bandwidth("-d", "cuda").stderr


def test_the_device_checks_say_that_there_is_no_gpu_and_succeed():
    assert "no GPU" in run(sys.executable, "bench/device_checks.py").stderr


def test_the_device_checks_can_be_rehearsed_on_a_cpu(tmp_path):
    run(
        sys.executable,
        "bench/device_checks.py",
        "--rehearse",
        "--only",
        "bandwidth",
        "roofline",
        "--json",
        str(tmp_path / "d"),
    )
    found = json.loads((tmp_path / "d").read_text())
    assert all(check["ok"] for check in found["results"].values())
    assert {row.get("decode") for row in found["results"]["roofline"]["rows"]} >= {1, 8, 32}
    assert found["results"]["bandwidth"]["of_the_slower_copy"]["host memory"] > 0
