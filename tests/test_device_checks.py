"""The parts of `bench/device_checks.py` that need no GPU: limits, models, arithmetic."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from mellmpi.config import CacheConfig, ModelConfig
from mellmpi.engine import build_executor
from mellmpi.models import checkpoint
from mellmpi.transport import blocks

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def load(monkeypatch):
    """(name) -> module of bench/."""
    monkeypatch.syspath_prepend(str(BENCH))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in ("alone", "gpu_checks", "record", "roofline"):
        sys.modules.pop(name, None)


def test_output_and_exit_code_of_a_check_are_returned(load):
    program = "import sys; print('found'); sys.stderr.write('why'); sys.exit(3)"
    assert load("alone").within(60, [sys.executable, "-c", program]) == ("found\n", "why", 3)


def test_a_check_that_takes_too_long_has_no_exit_code(load):
    assert load("alone").within(0.3, ["sleep", "600"])[2] is None


def started(*command):
    """Start a job like a check. Returns it and its first line of output."""
    job = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    return job, job.stdout.readline().strip()


def test_processes_that_a_check_has_started_end_with_it(load):
    job, child = started("sh", "-c", "sleep 600 & echo $!; wait")
    load("alone").end(job)
    left = [p for p in psutil.process_iter() if p.pid == int(child)]
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left)


def test_a_check_that_ignores_sigterm_is_killed(load):
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); "
    job, _ = started(sys.executable, "-c", program + "time.sleep(600)")
    load("alone").end(job, patience_s=0.2)
    assert job.returncode == -9


def test_without_the_default_model_random_weights_of_its_shape_are_used(
    load, tmp_path, capsys, monkeypatch
):
    checks = load("device_checks")

    def resolve(model, cache_dir):
        raise ValueError("it is not installed")

    with monkeypatch.context() as patch:
        patch.setattr("mellmpi.models.resolve", resolve)
        model = checks.usable(None, False, tmp_path)
    assert "not installed" in capsys.readouterr().err
    found = checkpoint.resolve(model, tmp_path)
    assert json.loads((found / "config.json").read_text())["num_hidden_layers"] == 30
    assert checks.usable("mine", False, tmp_path) == "mine"
    assert checks.usable(None, True, tmp_path).startswith("random:tiny")


class Slots:
    """Copies in host memory, done after some calls of `done`; copies of `spoil` blocks fail."""

    def __init__(self, arena, spoil):
        self.arena, self.spoil, self.slots, self.calls_left = arena, spoil, {}, {}

    def new_slot(self):
        slot = np.zeros(self.arena.block_bytes, np.uint8)
        self.slots[slot.ctypes.data] = slot
        return slot.ctypes.data

    def to_host(self, block_id, address):
        self.slots[address][:] = self.arena.blocks[block_id].numpy()
        self.calls_left[address] = 2

    def to_device(self, block_id, address):
        if block_id not in self.spoil:
            self.arena.blocks[block_id] = torch.from_numpy(self.slots[address].copy())
        self.calls_left[address] = 2

    def done(self, address):
        self.calls_left[address] -= 1
        return self.calls_left[address] <= 0


@pytest.mark.parametrize("spoil", [(), (127,), (64,)])
def test_copies_are_right_only_if_every_block_is_unchanged(load, monkeypatch, spoil):
    checks = load("gpu_checks")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(blocks, "CudaCopies", lambda arena: Slots(arena, spoil))
    assert checks.copies_right("cpu") is not bool(spoil)


def test_the_checks_that_start_jobs_can_be_rehearsed(tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, "bench/device_checks.py", "--rehearse", "--json", str(found)]
    done = subprocess.run(
        [*command, "--only", "self_test", "doctor"],
        cwd=BENCH.parent,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(found.read_text())["results"]
    assert results["self_test"]["device_buffers_work"]
    assert any("in place" in line for line in results["doctor"]["said"])


def test_the_least_work_of_a_step_is_its_weights_its_kv_and_its_products(load, tmp_path):
    roofline = load("roofline")
    directory = checkpoint.resolve("random:tiny-llama", tmp_path)
    steps = object.__new__(roofline.Steps)
    steps.executor = build_executor(
        directory, ModelConfig(model="m"), CacheConfig(kv_cache_memory_bytes=1 << 20), device="cpu"
    )
    steps.kv = steps.executor.models[0].kv
    layer = 64 * (4 + 2 + 2) * 16 + 4 * 16 * 64 + 3 * 64 * 128  # q, k, v; o; the MLP
    weights, head, kv = 2 * layer, 64 * 512, 2 * 2 * 2 * 16 * 2
    num_bytes, flops = steps.work(3, 99, 1)
    assert num_bytes == 2 * (weights + head) + 3 * 100 * kv
    assert flops == 2 * 3 * (weights + head) + 3 * 2 * 4 * (2 * 2 * 100 * 16)
    num_bytes, flops = steps.work(1, 0, 40)
    attention = sum(2 * 4 * (2 * 2 * seen * 16) for seen in range(1, 41))
    assert num_bytes == 2 * (weights + head) + 40 * kv
    assert flops == 2 * (40 * weights + head) + attention


def test_short_calls_are_timed_many_at_a_time(load, monkeypatch):
    roofline, calls = load("roofline"), []
    monkeypatch.setattr(time, "perf_counter", lambda: float(len(calls)))
    assert roofline.seconds("cpu", lambda: calls.append(0), inner=5, repeats=3) == 1.0
    assert len(calls) == 1 + 3 * 5
