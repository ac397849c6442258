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


def test_the_doctor_says_what_ranks_mpi_and_links_are_like_once():
    code, out, _ = examined(mpirun(), *FLAGS, "-n", "3")
    assert code == 0 and out.count("mellmpi     ") == 1
    assert "3 rank(s) (0 … 2)" in out and "goes on when a worker dies" in out
    assert "host 0 to host 0" in out and "MB/s" in out and "in place" in out
    assert out.count("nearby      ") == 1 and "memory" in out


def test_the_doctor_says_what_to_type_where_a_dead_worker_would_end_the_job():
    code, out, _ = examined(mpirun(), *WITHOUT_ULFM, "-n", "2")
    assert code == 0 and "--with-ft ulfm" in out and "there is but one worker" in out


def test_the_doctor_speaks_without_mpirun_too():
    code, out, _ = examined()
    assert code == 0 and "mpirun -np 3" in out


def test_the_doctor_refuses_what_it_does_not_know():
    code, _, err = examined(flags=("--checksums", "sometimes"))
    assert code == 2 and "sometimes" in err


class FakeJob:
    """Rank 0, without a GPU, and a worker on a host with one."""

    rank, hosts, neighbours = 0, ["front", "node1"], [0]
    library, thread_level, survivable = "an MPI", "serialized", True

    def __init__(self, gpus=1):
        self.gpus = gpus

    def gather(self, data):
        row = json.loads(data) if data.startswith(b"{") else None
        node = {"host": "node1", "gpus": self.gpus}
        return [data, json.dumps({**row, **node}).encode()] if row else [b"\1\0", b"\0\1"]

    def connect(self, *_):
        return SimpleNamespace(rings=True, read_by=frozenset(), num_workers=1)


def test_the_doctor_says_how_blocks_of_workers_travel_where_rank_0_has_no_gpu(capsys):
    assert doctor.doctor(Config(), FakeJob()) == 0
    assert "blocks      through pinned host memory" in capsys.readouterr().out


def test_the_doctor_says_which_host_has_no_gpu_for_a_job_that_wants_one(capsys):
    wants = replace(Config(), device="cuda")
    assert doctor.doctor(wants, FakeJob(gpus=0)) == 1
    assert "PROBLEM     --device cuda, and node1 has no GPU" in capsys.readouterr().out
    assert doctor.doctor(wants, FakeJob(gpus=1)) == 0
    assert doctor.doctor(Config(), FakeJob(gpus=0)) == 0
    assert "PROBLEM" not in capsys.readouterr().out


def test_the_doctor_says_where_there_are_more_workers_than_gpus(capsys):
    rows = [{"host": "front", "gpus": 0}, *[{"host": "node1", "gpus": 1}] * 2]
    [problem] = doctor._seats(Config(), rows)
    assert "node1 has 1 GPU(s) for 2 workers" in problem and "--oversubscribe-gpus" in problem
    assert doctor._seats(replace(Config(), oversubscribe_gpus=True), rows) == []
    assert doctor._seats(replace(Config(), device="cpu"), rows) == []
