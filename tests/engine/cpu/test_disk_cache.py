"""The disk cache of machine code: found again, and never used after a change of the sources."""

import shutil
import subprocess
import sys
from pathlib import Path

import mellmpi.engine.cpu
from mellmpi.engine.cpu.disk_cache import compile_lock, object_code, source_stamp
from mellmpi.engine.cpu.gemm import microkernels
from mellmpi.engine.cpu.step import step

SOURCES = Path(mellmpi.engine.cpu.__file__).parent
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from numba import njit, config
from disk_cache import cached_on_disk, compile_lock

@cached_on_disk
@njit
def twice(x):
    return 2 * x

with compile_lock(twice):
    assert twice(int(sys.argv[2])) == 2 * int(sys.argv[2])
twice(1.5)
print(sum(twice.stats.cache_hits.values()), sum(twice.stats.cache_misses.values()))
"""


def run(program: Path, sources: Path) -> tuple[int, int]:
    """(hits, misses) of a process that compiles `twice` for integers and floats."""
    return output(start(program, sources))


def start(program: Path, sources: Path) -> subprocess.Popen:
    command = [sys.executable, str(program), str(sources), "21"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process: subprocess.Popen) -> tuple[int, int]:
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    hits, misses = printed.split()
    return int(hits), int(misses)


def test_code_is_loaded_from_disk_until_any_kernel_changes(tmp_path):
    sources, program = tmp_path / "sources", tmp_path / "program.py"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
    program.write_text(PROGRAM)
    assert run(program, sources) == (0, 2)
    assert run(program, sources) == (2, 0)
    with open(sources / "gemm.py", "a") as kernel:
        kernel.write("# changed\n")
    assert run(program, sources) == (0, 2)


def test_each_signature_has_a_file_of_its_own(tmp_path):
    sources, program = tmp_path / "sources", tmp_path / "program.py"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
    program.write_text(PROGRAM)
    run(program, sources)
    assert len(list((tmp_path / "__pycache__").glob("*.nbi"))) == 2
    assert len(list((tmp_path / "__pycache__").glob("*.nbc"))) == 2


def test_of_ranks_that_start_together_one_compiles_and_the_others_load(tmp_path):
    """Only the signature that is compiled under the lock: integers."""
    program, cached = tmp_path / "program.py", tmp_path / "__pycache__"
    cached.mkdir()
    program.write_text(PROGRAM.replace("twice(1.5)", ""))
    ranks = [start(program, SOURCES) for _ in range(3)]
    assert sorted(output(rank) for rank in ranks) == [(0, 1), (1, 0), (1, 0)]


def test_waiting_for_the_compile_lock_ends_after_wait_s():
    with compile_lock(step), compile_lock(step, wait_s=0):
        pass


def test_an_object_file_is_cached():
    assert object_code(microkernels) == object_code(microkernels)
    names = [path.name for path in (SOURCES / "__pycache__").glob("microkernels-*")]
    assert all(name.endswith(".o") for name in names)  # no temporary files are left


def test_the_source_stamp_is_reproducible():
    assert source_stamp() == source_stamp() and len(source_stamp()) == 16
