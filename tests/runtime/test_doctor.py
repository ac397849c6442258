import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

from mellmpi.config import Config
from mellmpi.runtime import doctor
from tests.mpi.harness import FLAGS, ROOT, WITHOUT_ULFM, mpirun


def examined(*launcher, flags=()):
    command = [*launcher, sys.executable, "-m", "mellmpi", "doctor", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_the_doctor_prints_ranks_mpi_and_links_once():
    code, out, _ = examined(mpirun(), *FLAGS, "-n", "3")
    assert code == 0 and out.count("mellmpi     ") == 1
    assert "3 rank(s) (0 … 2)" in out and "continues when a worker dies" in out
    assert "host 0 to host 0" in out and "MB/s" in out and "in place" in out
    assert out.count("nearby      ") == 1 and "memory" in out


def test_the_doctor_says_what_to_type_if_a_dead_worker_would_end_the_job():
    code, out, _ = examined(mpirun(), *WITHOUT_ULFM, "-n", "2")
    assert code == 0 and "--with-ft ulfm" in out and "there is only one worker" in out


def test_the_doctor_runs_without_mpirun():
    code, out, _ = examined()
    assert code == 0 and "mpirun -np 3" in out


def test_the_doctor_refuses_an_unknown_value():
    code, _, err = examined(flags=("--checksums", "sometimes"))
    assert code == 2 and "sometimes" in err


class FakeJob:
    """Rank 0 on a host without GPU, and a worker on a host with GPUs."""

    rank, hosts, local_ranks = 0, ["front", "node1"], [0]
    library, thread_level, survivable = "an MPI", "serialized", True

    def __init__(self, gpus=1):
        self.gpus = gpus

    def gather(self, data):
        row = json.loads(data) if data.startswith(b"{") else None
        node = {"host": "node1", "gpus": self.gpus}
        return [data, json.dumps({**row, **node}).encode()] if row else [b"\1\0", b"\0\1"]

    def connect(self, *_):
        return SimpleNamespace(all_ring=True, read_by=frozenset(), num_workers=1)


def test_the_doctor_prints_the_path_between_workers_even_if_rank_0_has_no_gpu(capsys):
    assert doctor.doctor(Config(), FakeJob()) == 0
    assert "blocks      through pinned host memory" in capsys.readouterr().out


def test_the_doctor_prints_which_host_lacks_the_gpu_that_the_job_needs(capsys):
    wants = replace(Config(), device="cuda")
    assert doctor.doctor(wants, FakeJob(gpus=0)) == 1
    assert "PROBLEM     --device cuda, but node1 has no GPU" in capsys.readouterr().out
    assert doctor.doctor(wants, FakeJob(gpus=1)) == 0
    assert doctor.doctor(Config(), FakeJob(gpus=0)) == 0
    assert "PROBLEM" not in capsys.readouterr().out


def test_the_doctor_prints_hosts_with_more_workers_than_gpus(capsys):
    rows = [{"host": "front", "gpus": 0}, *[{"host": "node1", "gpus": 1}] * 2]
    [problem] = doctor._gpu_problems(Config(), rows)
    assert "node1 has 1 GPU(s) for 2 workers" in problem and "--oversubscribe-gpus" in problem
    assert doctor._gpu_problems(replace(Config(), oversubscribe_gpus=True), rows) == []
    assert doctor._gpu_problems(replace(Config(), device="cpu"), rows) == []
