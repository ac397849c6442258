"""Machine code on disk: found again, and never taken for code made from something else."""

import shutil
import subprocess
import sys
from pathlib import Path

import mellmpi.engine.kernels
from mellmpi.engine.kernels.compiled import source_stamp

SOURCES = Path(mellmpi.engine.kernels.__file__).parent
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from numba import njit, config
from compiled import kept

@kept
@njit
def twice(x):
    return 2 * x

assert twice(int(sys.argv[2])) == 2 * int(sys.argv[2])
twice(1.5)
print(sum(twice.stats.cache_hits.values()), sum(twice.stats.cache_misses.values()))
"""


def run(program: Path, sources: Path) -> tuple[int, int]:
    """(hits, misses) of a process that compiles `twice` for integers and floats."""
    command = [sys.executable, str(program), str(sources), "21"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    hits, misses = done.stdout.split()
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


def test_the_stamp_is_of_all_sources_and_stays_the_same():
    assert source_stamp() == source_stamp() and len(source_stamp()) == 16
