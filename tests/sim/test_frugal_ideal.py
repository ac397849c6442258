"""`frugal` on the idealised cluster: few preemptions, workers and moves."""

import numpy as np
import pytest

from mellmpi.protocol import ModelKv
from mellmpi.sim import IdealReplay, Settings, make_load
from mellmpi.sim.replay import figures
from mellmpi.workload import gamma


def run(load, thrift=0.5):
    settings = Settings(thrift=thrift, tick_s=0.25, seed=0, clock=lambda: 0.0)
    tally = IdealReplay(load, "frugal", [(ModelKv("m", 1, 2),)] * 60, settings).run(lambda _: None)
    return figures(load, tally, 0.0)


def random_load(seed):
    workload = gamma(300, rate=4.0, cv=2.0, prompt=300, output=600, seed=seed)
    return make_load(workload, {"m": 2}, 16000, 30.0)


@pytest.mark.parametrize("seed", range(6))
def test_with_enough_workers_there_are_hardly_any_preemptions(seed):
    found = run(random_load(seed))
    assert found["finished"] == 300 and found["preemptions"] <= 2


def test_more_thrift_moves_more_bytes_and_uses_fewer_workers():
    load = random_load(0)
    found = [run(load, thrift) for thrift in (0.0, 0.5, 1.0)]
    for one, key in ((1, "migrated_bytes"), (-1, "gpus_mean")):
        assert (np.diff([one * f[key] for f in found]) > 0).all()
