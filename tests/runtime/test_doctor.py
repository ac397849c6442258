import subprocess
import sys

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
