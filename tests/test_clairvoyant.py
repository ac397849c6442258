"""The benchmark `clairvoyant`, interpreted: compiling it takes longer than a small load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
RUNS = """
import json
from clairvoyant import Case, by_package, by_search, gamma, load_of

case = Case("", 1, "llama-2-13b", 4, 25, 60, 2, 3, 10)
load = load_of(case, gamma(400, 6.0, 1.0, 300, 200, seed=3))
runs = {"package": by_package(case, load), "rule": by_search(case, load, 1)}
print(json.dumps(runs | {"search": by_search(case, load, 2)}))
"""


@pytest.fixture(scope="module")
def runs():
    done = subprocess.run(
        [sys.executable, "-c", RUNS],
        cwd=BENCH,
        text=True,
        capture_output=True,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_rule_of_the_search_does_what_the_package_does(runs):
    rule, package = runs["rule"], runs["package"]
    assert rule["gpus_over_bound"] == pytest.approx(package["gpus_over_bound"], abs=0.01)
    assert rule["moves_per_request"] == pytest.approx(package["moves_per_request"], rel=0.2)
    assert rule["overflows"] == 0


def test_knowing_the_future_saves_moves_and_gpus(runs):
    search, rule = runs["search"], runs["rule"]
    assert search["moves_per_request"] < 0.9 * rule["moves_per_request"]
    assert search["gpus_over_bound"] < rule["gpus_over_bound"]
