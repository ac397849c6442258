"""What may know what. The tables are the architecture; the tests below only read them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DATA = {"protocol", "config", "options", "metrics", "activity", "series", "predictions",
        "workload"}  # fmt: skip
PARTS = DATA | {
    "core",
    "engine",
    "transport",
    "timeline",
    "front",
    "sim",
    "runtime",
    "cli",
    "flags",
    "simulate",
}

MAY_IMPORT = {  # part of the package -> what of ours it may import, beside itself
    "__init__": set(),
    "__main__": {"cli"},
    "protocol": set(),
    "config": set(),
    "options": {"config"},
    "flags": {"config"},
    "core": {"protocol", "config"},
    "engine": {"protocol", "config"},
    "transport": {"protocol"},
    "series": {"protocol"},
    "activity": {"protocol", "series"},
    "metrics": {"protocol", "series", "activity", "predictions"},
    "predictions": {"series"},
    "workload": {"protocol"},
    "timeline": {"protocol", "series"},
    "front": {"protocol", "config", "metrics", "workload"},
    "sim": {"core", "front"} | DATA,
    "simulate": {"core", "front", "sim"} | DATA,
    "runtime": PARTS - {"sim", "cli", "flags", "simulate"},
    "cli": PARTS,
}
IMPURE = {
    "asyncio", "logging", "mpi4py", "multiprocessing", "os", "pathlib", "random", "secrets",
    "socket", "subprocess", "sys", "threading", "time", "torch",
}  # fmt: skip
MAY_NOT_IMPORT = {  # part -> modules that it must do without
    "core": IMPURE,
    "protocol": IMPURE,
    "config": IMPURE,
    "sim": IMPURE - {"random", "pathlib"},
}
ONLY_IN = {  # module -> the only places that may import it
    "mpi4py": {"transport/mpi.py", "transport/mpi_channel.py", "transport/device_probe.py"},
    "torch": {"engine/", "transport/devices.py", "transport/device_probe.py"},
    "pickle": set(),
}
WITHOUT = {  # imports with these modules missing
    "mellmpi.core.batch": {"torch", "mpi4py"},
    "mellmpi.core.cluster": {"torch", "mpi4py"},
    "mellmpi.sim.simulator": {"torch", "mpi4py"},
    "mellmpi.metrics": {"torch", "mpi4py"},
    "mellmpi.runtime.scheduler": {"torch"},  # rank 0 needs no engine
    "mellmpi.runtime.launch": {"torch"},
    "mellmpi.cli": {"torch", "mpi4py"},
}
LINES_OF_A_FUNCTION, LINES_OF_A_FILE = 40, 350
LONGER = {"protocol.py"}  # every message in one file
READS_THE_ENVIRONMENT = {
    "cli.py",
    "transport/devices.py",  # hands it to a child
    "transport/mpi.py",  # MPI takes some settings from there alone
    "transport/starting.py",  # before MPI has started only the launcher's variables tell ranks
}
NO_NAME_WITH = ("Manager", "Handler", "Helper", "Util")
NO_FILE_NAMED = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}

ROOT = Path(__file__).resolve().parent.parent / "mellmpi"
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
each_file = pytest.mark.parametrize("name", TREES)


def part_of(name: str) -> str:
    """The first level: "core/batch.py" belongs to "core", "cli.py" to "cli"."""
    return name.split("/")[0].removesuffix(".py")


def imports(name: str) -> Iterator[str]:
    """Every module that a file imports, wherever in it; ours as "mellmpi.part"."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}:{node.lineno}: relative import"
            if node.module == "mellmpi":
                yield from (f"mellmpi.{alias.name}" for alias in node.names)
            else:
                yield node.module


def ours(name: str) -> set[str]:
    """Parts of the package that a file imports."""
    found = {module.split(".")[1] for module in imports(name) if module.startswith("mellmpi.")}
    return found & {part_of(other) for other in TREES}  # not mellmpi.__version__


def test_there_is_something_to_look_at():
    assert {"core/batch.py", "sim/simulator.py", "protocol.py"} <= TREES.keys()
    assert ours("core/cluster.py") == {"config", "core", "protocol"}


@each_file
def test_dependencies_point_one_way(name):
    part = part_of(name)
    assert part in MAY_IMPORT, f"{part} has no row in the table"
    assert ours(name) <= MAY_IMPORT[part] | {part}


@each_file
def test_what_must_be_pure_is_pure(name):
    others = {module.split(".")[0] for module in imports(name)}
    assert not others & MAY_NOT_IMPORT.get(part_of(name), set())


@each_file
def test_heavy_modules_stay_in_their_place(name):
    others = {module.split(".")[0] for module in imports(name)}
    for module, places in ONLY_IN.items():
        assert module not in others or name.startswith(tuple(places)), module


@pytest.mark.parametrize("module", WITHOUT)
def test_it_imports_without_what_it_must_do_without(module):
    blocked = {name: None for name in WITHOUT[module]}
    code = f"import sys; sys.modules.update({blocked}); import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@each_file
def test_functions_and_files_are_short(name):
    lines = (ROOT / name).read_text().count("\n")
    assert lines <= LINES_OF_A_FILE or name in LONGER, f"{name} has {lines} lines"
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LINES_OF_A_FUNCTION, f"{name}: {node.name} has {length} lines"


def test_no_rule_is_kept_for_what_is_short_enough():
    for name in LONGER:
        assert (ROOT / name).read_text().count("\n") > LINES_OF_A_FILE


def test_files_are_named_by_a_concept():
    assert not {path.name for path in FILES} & NO_FILE_NAMED


@each_file
def test_classes_are_named_by_what_they_are(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ClassDef):
            assert not any(word in node.name for word in NO_NAME_WITH), node.name


@each_file
def test_nothing_prints(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{name}:{node.lineno}"


@each_file
def test_the_environment_is_read_in_one_place(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
            assert name in READS_THE_ENVIRONMENT, f"{name}:{node.lineno}"


@each_file
def test_no_import_hides_a_cycle(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Name | ast.Attribute):
            word = node.id if isinstance(node, ast.Name) else node.attr
            assert word != "TYPE_CHECKING", f"{name}:{node.lineno}"
