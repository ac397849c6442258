"""What may know what. The tables are the architecture; the tests below only read them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOMS = {
    "cli",
    "protocol",
    "config",
    "console",
    "models",
    "scheduler",
    "worker",
    "costs",
    "engine",
    "transport",
    "files",
    "frontend",
    "keys",
    "launcher",
    "loadgen",
    "runtime",
    "telemetry",
    "workload",
    "sim",
}
MAY_IMPORT = {  # part of the package -> what of ours it may import, beside itself
    "__init__": set(),
    "__main__": {"cli"},
    "protocol": set(),
    "config": set(),
    "console": {"config", "files"},
    "costs": {"protocol"},
    "scheduler": {"protocol", "config", "costs"},
    "worker": {"protocol", "config", "costs"},
    "models": set(),
    "engine": {"protocol", "config", "models"},
    "transport": {"launcher", "protocol"},
    "telemetry": {"protocol"},
    "workload": {"protocol"},
    "files": {"config"},
    "launcher": set(),
    "loadgen": {"config", "files", "telemetry", "workload"},
    "frontend": {"files", "keys", "protocol", "config", "telemetry", "workload"},
    "keys": {"config", "protocol"},
    "sim": {"config", "costs", "files", "protocol", "scheduler", "worker", "workload"},
    "runtime": ROOMS - {"sim", "cli", "console", "loadgen"},
    "cli": ROOMS,
}
COMMANDS = {  # (file, module) past a door: the command line loads the one command that it runs
    ("cli/parser.py", "runtime/begin"),
    ("cli/parser.py", "runtime/doctor"),
    ("cli/parser.py", "runtime/ending"),
    ("cli/parser.py", "runtime/launch"),
}
IMPURE = {
    "asyncio",
    "logging",
    "mpi4py",
    "multiprocessing",
    "os",
    "pathlib",
    "random",
    "secrets",
    "socket",
    "subprocess",
    "sys",
    "threading",
    "time",
    "torch",
}
MAY_NOT_IMPORT = {  # part -> modules that it must do without
    "scheduler": IMPURE,
    "worker": IMPURE,
    "costs": IMPURE,
    "protocol": IMPURE,
    "config": IMPURE,
    "sim": IMPURE - {"random", "pathlib"},
}
IMPURE_FILES = {"sim/command.py", "sim/options.py"}  # a command writes files and takes time
ONLY_IN = {  # module -> the only places that may import it
    "mpi4py": {"transport/mpi/library.py"},
    "torch": {"engine/", "transport/blocks/devices.py", "transport/probes/device_buffers.py"},
    "pickle": set(),
    "prometheus_client": {"telemetry/prometheus/"},
}
WITHOUT = {  # imports with these modules missing
    "mellmpi.worker.batch": {"torch", "mpi4py"},
    "mellmpi.scheduler.cluster": {"torch", "mpi4py"},
    "mellmpi.sim": {"torch", "mpi4py", "jinja2", "tokenizers", "matplotlib", "tqdm"},
    "mellmpi.telemetry": {"torch", "mpi4py", "matplotlib", "prometheus_client"},
    "mellmpi.loadgen": {"torch", "mpi4py", "aiohttp", "tokenizers", "matplotlib", "tqdm"},
    "mellmpi.runtime.scheduler": {"torch", "matplotlib"},  # rank 0 needs no engine
    "mellmpi.runtime.launch": {"torch", "matplotlib"},
    "mellmpi.runtime.begin": {"numpy", "numba", "torch", "mpi4py"},  # the URL is there at once
    "mellmpi.runtime.ending": {"numpy", "msgpack", "mpi4py"},  # tells of what is missing
    "mellmpi.cli.parser": {"torch", "mpi4py"},
    "mellmpi.console": {"torch", "mpi4py", "numpy", "msgpack", "rich"},
    "mellmpi.console.top": {"torch", "mpi4py", "numpy", "msgpack", "tqdm"},
}
LINES_OF_A_FUNCTION, LINES_OF_A_FILE = 40, 300
LONGER: set[str] = set()
READS_THE_ENVIRONMENT = {
    "cli/parser.py",
    "runtime/serving/process.py",  # hands it to a child
    "transport/blocks/devices.py",  # hands it to a child
    "transport/mpi/library.py",  # MPI takes some settings from there alone
    "transport/mpi/starting.py",  # before MPI has started only the launcher's variables tell ranks
}
NO_NAME_WITH = ("Manager", "Handler", "Helper", "Util")
NO_FILE_NAMED = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}

ROOT = Path(__file__).resolve().parent.parent / "mellmpi"
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
each_file = pytest.mark.parametrize("name", TREES)


def part_of(name: str) -> str:
    """The first level: "worker/batch.py" belongs to "worker", "config.py" to "config"."""
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
    assert {"worker/batch.py", "sim/simulator.py", "protocol/wire.py"} <= TREES.keys()
    assert ours("scheduler/cluster.py") == {"config", "protocol", "scheduler"}


@each_file
def test_dependencies_point_one_way(name):
    part = part_of(name)
    assert part in MAY_IMPORT, f"{part} has no row in the table"
    assert ours(name) <= MAY_IMPORT[part] | {part}


def room_of(name: str) -> str:
    """The folder of a file: "scheduler/migration" for "scheduler/migration/handover.py"."""
    return name.rpartition("/")[0]


@each_file
def test_rooms_are_entered_by_their_doors(name):
    """From another room only what its `__init__` exports; a room within one is not another."""
    mine = room_of(name)
    for module in imports(name):
        path = module.removeprefix("mellmpi.").replace(".", "/")
        theirs = room_of(path)
        if not module.startswith("mellmpi.") or not theirs or f"{path}.py" not in TREES:
            continue
        inside = mine == theirs or mine.startswith(f"{theirs}/")
        assert inside or (name, path) in COMMANDS, f"{name} imports {module}"


@pytest.mark.parametrize("room", sorted({room_of(name) for name in TREES} - {""}))
def test_a_room_says_what_it_is_for_and_what_it_does_not_know(room):
    text = ast.get_docstring(TREES[f"{room}/__init__.py"])
    assert text and len(text.splitlines()) >= 3, "three lines: its purpose, and what it knows not"


def test_no_modules_import_each_other_in_a_circle():
    """Doors aside: they import what is behind them."""
    graph = {}
    for name in TREES:
        paths = {module.removeprefix("mellmpi.").replace(".", "/") for module in imports(name)}
        graph[name] = {f"{path}.py" for path in paths} & TREES.keys()
    TopologicalSorter(graph).prepare()  # raises CycleError


@each_file
def test_what_must_be_pure_is_pure(name):
    others = {module.split(".")[0] for module in imports(name)}
    assert name in IMPURE_FILES or not others & MAY_NOT_IMPORT.get(part_of(name), set())


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
