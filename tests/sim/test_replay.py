import numpy as np
import pytest

from mellmpi.protocol import ModelKv
from mellmpi.scheduler.policies import POLICIES
from mellmpi.sim import IdealReplay, Settings, make_load
from mellmpi.sim.bound import live_bytes
from mellmpi.sim.replay import figures
from mellmpi.workload import Workload, gamma


def small(seed=0, capacity=4000, num=150):
    workload = gamma(num, rate=3.0, cv=2.0, prompt=200, output=300, seed=seed)
    return make_load(workload, {"m": 2}, capacity * 2, 30.0)


SETTINGS = Settings(thrift=0.5, tick_s=0.5, seed=0, clock=lambda: 0.0)


def replay(load, policy, gpus=60):
    return IdealReplay(load, policy, [(ModelKv("m", 1, 2),)] * gpus, SETTINGS)


def test_live_bytes_equal_a_direct_count():
    load = small()
    age = load.samples[:, None] - load.arrivals
    live = (age >= 0) & (age < load.outputs)
    counted = (live * (load.prompts + age) * 2).sum(1)
    sizes = np.full(len(load.arrivals), 2)
    found = live_bytes(load.arrivals, load.prompts, load.outputs, sizes, load.samples)
    assert (found == counted).all()
    assert (load.bound == np.ceil(counted / load.capacity)).all()


def test_a_request_no_worker_can_hold_is_dropped_and_counted():
    nothing = ("", "")
    workload = Workload(np.array([0.0, 1.0]), np.array([5, 5]), np.array([5, 6]), nothing, nothing)
    load = make_load(workload, {"m": 1}, 10, 30.0)
    assert (load.dropped, len(load.arrivals)) == (1, 1)
    with pytest.raises(ValueError, match="--gpu-kv-gib"):
        make_load(workload, {"m": 1}, 9, 30.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_not_before_its_last_step(policy):
    load = small()
    found = replay(load, policy).run(lambda done: None)
    assert len(found.finished) == len(load.arrivals) and not found.rejected
    assert all(found.finished[i] >= load.arrivals[i] + load.outputs[i] for i in found.finished)
    assert (np.array(found.used_bytes) <= np.array(found.gpus) * load.capacity).all()


def test_with_room_for_all_no_request_waits_and_the_memory_in_use_equals_the_live_bytes():
    load = small(capacity=10**6)
    found = replay(load, "best_fit").run(lambda done: None)
    assert figures(load, found, 0.0)["stall_mean_s"] == 0.0
    sizes = np.full(len(load.arrivals), 2)
    live = live_bytes(load.arrivals, load.prompts, load.outputs, sizes, load.samples)
    assert found.used_bytes == live.tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_repeated_simulation_gives_the_same_figures(policy):
    load = small(seed=3)
    runs = [figures(load, replay(load, policy).run(lambda done: None), 0.0) for _ in range(2)]
    assert runs[0] == runs[1]


def test_too_few_workers_make_requests_wait():
    load = small()
    found = figures(load, replay(load, "best_fit", gpus=1).run(lambda done: None), 0.0)
    assert found["gpus_peak"] == 1 and found["stall_mean_s"] > 1
