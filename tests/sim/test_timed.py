import json

import numpy as np
import pytest

from mellmpi.config import BatchConfig
from mellmpi.costs import CostModel
from mellmpi.protocol import ModelKv
from mellmpi.scheduler.policies import POLICIES
from mellmpi.sim import MODELS, IdealReplay, Settings, make_load
from mellmpi.sim.profiles import PROFILES, cost_from, cost_of
from mellmpi.sim.replay import figures
from mellmpi.sim.timed import TimedReplay
from mellmpi.workload import gamma

SETTINGS = Settings(thrift=0.5, tick_s=0.5, seed=0, clock=lambda: 0.0, park_after_s=0.0)
COST = CostModel(
    prefill_token_s=1e-4,
    step_s=0.03,
    decode_token_s=5e-4,
    link_Bps=1e6,
    link_latency_s=1e-3,
    wake_s=1.0,
)
NO_TIME = CostModel(0.0, 1 / 30, 0.0, float("inf"), 0.0, 0.0)


def small(block_size=4, seed=0, num=120):
    workload = gamma(num, rate=3.0, cv=2.0, prompt=200, output=150, seed=seed)
    return make_load(workload, {"m": 2}, 8000, 30.0, {"m": block_size})


def replay(load, policy, cost=COST, gpus=40, block_size=4):
    hosts = [(ModelKv("m", block_size, 2 * block_size),)] * gpus
    return TimedReplay(load, policy, hosts, cost, BatchConfig(), SETTINGS)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_and_takes_at_least_its_compute_time(policy):
    load = small()
    run = replay(load, policy)
    found = run.run(lambda done: None)
    assert len(found.finished) == len(load.arrivals) and not found.rejected
    took_s = [found.finished[i] - load.arrivals[i] / 30 for i in found.finished]
    alone_s = load.outputs * COST.forward_s(0, 1) + load.prompts * COST.prefill_token_s
    least_s = [alone_s[i] - COST.forward_s(1, 0) for i in found.finished]
    assert (np.array(took_s) >= np.array(least_s)).all()
    assert all(found.ttft_s[i] > load.prompts[i] * COST.prefill_token_s for i in found.finished)
    assert all(pace.worker.batch.free_bytes == 8000 for pace in run.paces)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_repeated_simulation_gives_the_same_figures(policy):
    load = small(seed=3)
    runs = [figures(load, replay(load, policy).run(lambda done: None), 0.0) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("policy", ["worst_fit", "frugal"])
def test_if_only_decoding_takes_time_the_result_is_that_of_the_ideal_cluster(policy):
    load = small(block_size=1)
    hosts = [(ModelKv("m", 1, 2),)] * 40
    ideal = IdealReplay(load, policy, hosts, SETTINGS).run(lambda done: None)
    found = replay(load, policy, NO_TIME, block_size=1).run(lambda done: None)
    a, b = figures(load, ideal, 0.0), figures(load, found, 0.0)
    assert b["gpus_mean"] == pytest.approx(a["gpus_mean"], rel=0.03)
    assert b["utilization"] == pytest.approx(a["utilization"], rel=0.03)


def test_slower_wakes_make_longer_stalls():
    load = small(num=40)
    slow = replay(load, "frugal", CostModel(1e-4, 0.03, 5e-4, 1e6, 1e-3, wake_s=30.0))
    fast = replay(load, "frugal")
    stalls = [figures(load, r.run(lambda done: None), 0.0)["stall_mean_s"] for r in (slow, fast)]
    assert stalls[0] > stalls[1]


@pytest.mark.parametrize("gpu", PROFILES)
def test_larger_models_take_longer_on_every_known_gpu(gpu):
    small, large = (cost_of(PROFILES[gpu], MODELS[m], 1e8) for m in ("llama-2-7b", "llama-2-13b"))
    assert 5e-3 < small.forward_s(0, 1) < large.forward_s(0, 1) < 0.1
    assert small.forward_s(1000, 0) < large.forward_s(1000, 0) < 1
    assert 1 < small.wake_s < large.wake_s < 20


def test_costs_are_read_only_from_the_report_of_a_run(tmp_path):
    path = tmp_path / "report.json"
    nothing = {"samples": 0, "xx": [], "xy": []}
    path.write_text(json.dumps({"costs": dict.fromkeys(("steps", "transfers", "wakes"), nothing)}))
    assert cost_from(path) == CostModel()
    for text in ("{", "[]", '{"costs": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"report\.json"):
            cost_from(path)
    with pytest.raises(ValueError, match="missing"):
        cost_from(tmp_path / "missing")
