"""What `bench/device_checks.py` does beside the GPU: limits, models, arithmetic."""

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
from mellmpi.transport.blocks import devices

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def load(monkeypatch):
    """(name) -> a module of bench/."""
    monkeypatch.syspath_prepend(str(BENCH))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in ("alone", "record", "roofline"):
        sys.modules.pop(name, None)


def test_what_a_check_says_and_how_it_ends_is_told(load):
    program = "import sys; print('found'); sys.stderr.write('why'); sys.exit(3)"
    assert load("alone").within(60, [sys.executable, "-c", program]) == ("found\n", "why", 3)


def test_a_check_that_takes_too_long_has_no_exit_code(load):
    assert load("alone").within(0.3, ["sleep", "600"])[2] is None


def begun(*command):
    """A job like a check's, and the first line that it says."""
    job = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    return job, job.stdout.readline().strip()


def test_what_a_check_has_started_ends_with_it(load):
    job, child = begun("sh", "-c", "sleep 600 & echo $!; wait")
    load("alone").end(job)
    left = [p for p in psutil.process_iter() if p.pid == int(child)]
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left)


def test_a_check_that_is_deaf_is_ended_too(load):
    program = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); "
    job, _ = begun(sys.executable, "-c", program + "time.sleep(600)")
    load("alone").end(job, patience_s=0.2)
    assert job.returncode == -9


def test_without_the_default_model_random_weights_of_its_shape_are_used(load, tmp_path, capsys):
    checks = load("device_checks")

    def resolve(model, cache_dir):
        raise ValueError("it is not installed")

    original, checkpoint.resolve = checkpoint.resolve, resolve
    try:
        model = checks.usable(None, False, tmp_path)
    finally:
        checkpoint.resolve = original
    assert "not installed" in capsys.readouterr().err
    found = checkpoint.resolve(model, tmp_path)
    assert json.loads((found / "config.json").read_text())["num_hidden_layers"] == 30
    assert checks.usable("mine", False, tmp_path) == "mine"
    assert checks.usable(None, True, tmp_path).startswith("random:tiny")


class Slots:
    """Copies in host memory, done some looks later; `spoil` blocks of them go wrong."""

    def __init__(self, arena, spoil):
        self.arena, self.spoil, self.slots, self.looks = arena, spoil, {}, {}

    def host_slot(self):
        slot = np.zeros(self.arena.block_bytes, np.uint8)
        self.slots[slot.ctypes.data] = slot
        return slot.ctypes.data

    def out(self, block_id, address):
        self.slots[address][:] = self.arena.blocks[block_id].numpy()
        self.looks[address] = 2

    def into(self, block_id, address):
        if block_id not in self.spoil:
            self.arena.blocks[block_id] = torch.from_numpy(self.slots[address].copy())
        self.looks[address] = 2

    def done(self, address):
        self.looks[address] -= 1
        return self.looks[address] <= 0


@pytest.mark.parametrize("spoil", [(), (127,), (64,)])
def test_copies_are_right_only_if_every_block_comes_back_as_it_was(load, monkeypatch, spoil):
    checks = load("device_checks")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(devices, "CudaCopies", lambda arena: Slots(arena, spoil))
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


def test_a_step_cannot_do_without_its_weights_its_kv_and_its_products(load, tmp_path):
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
