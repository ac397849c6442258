"""Machine code on disk: found again, and never taken for code made from something else."""

import shutil
import subprocess
import sys
from pathlib import Path

import mellmpi.engine.cpu
from mellmpi.engine.cpu.disk_cache import object_code, one_at_a_time, source_stamp
from mellmpi.engine.cpu.gemm import tiles
from mellmpi.engine.cpu.step import step

SOURCES = Path(mellmpi.engine.cpu.__file__).parent
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from numba import njit, config
from compiled import kept, one_at_a_time

@kept
@njit
def twice(x):
    return 2 * x

with one_at_a_time(twice):
    assert twice(int(sys.argv[2])) == 2 * int(sys.argv[2])
twice(1.5)
print(sum(twice.stats.cache_hits.values()), sum(twice.stats.cache_misses.values()))
"""


def run(program: Path, sources: Path) -> tuple[int, int]:
    """(hits, misses) of a process that compiles `twice` for integers and floats."""
    return ended(start(program, sources))


def start(program: Path, sources: Path) -> subprocess.Popen:
    command = [sys.executable, str(program), str(sources), "21"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> tuple[int, int]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    hits, misses = output.split()
    return int(hits), int(misses)


def test_code_is_found_again_until_any_kernel_changes(tmp_path):
    sources, program = tmp_path / "kernels", tmp_path / "program.py"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
    program.write_text(PROGRAM)
    assert run(program, sources) == (0, 2)
    assert run(program, sources) == (2, 0)
    with open(sources / "tile.py", "a") as tile:
        tile.write("# changed\n")
    assert run(program, sources) == (0, 2)


def test_each_signature_has_a_file_of_its_own(tmp_path):
    sources, program = tmp_path / "kernels", tmp_path / "program.py"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
    program.write_text(PROGRAM)
    run(program, sources)
    assert len(list((tmp_path / "__pycache__").glob("*.nbi"))) == 2
    assert len(list((tmp_path / "__pycache__").glob("*.nbc"))) == 2


def test_of_ranks_that_start_together_one_compiles_and_the_others_load(tmp_path):
    """Only what is compiled under the lock: the integers."""
    program, cached = tmp_path / "program.py", tmp_path / "__pycache__"
    cached.mkdir()
    program.write_text(PROGRAM.replace("twice(1.5)", ""))
    ranks = [start(program, SOURCES) for _ in range(3)]
    assert sorted(ended(rank) for rank in ranks) == [(0, 1), (1, 0), (1, 0)]


def test_a_lock_that_is_never_given_back_is_not_waited_for_for_ever():
    with one_at_a_time(step), one_at_a_time(step, wait_s=0):
        pass


def test_an_object_file_is_made_once():
    assert object_code(tiles) == object_code(tiles)
    names = [path.name for path in (SOURCES / "__pycache__").glob("tiles-*")]
    assert all(name.endswith(".o") for name in names)  # no parts are left behind


def test_the_stamp_is_of_all_sources_and_stays_the_same():
    assert source_stamp() == source_stamp() and len(source_stamp()) == 16
