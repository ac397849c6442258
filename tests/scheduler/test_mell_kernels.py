"""The kernels of MELL: compiled when the policy is chosen, and equal to their plain Python."""

import hashlib
import os
import random
import subprocess
import sys

import numpy as np

from mellmpi.scheduler.policies import policy_for
from mellmpi.scheduler.policies.mell import policy as mell
from mellmpi.scheduler.policies.mell.epoch import epoch, feasible
from mellmpi.scheduler.policies.mell.kernels import allocate
from tests.scheduler.packing import Packing
from tests.scheduler.stage import KV, request
from tests.scheduler.views import view


def digest():
    """A hash of all placements and moves in 120 operations."""
    rng, packing = random.Random(3), Packing()
    for step in range(120):
        live = list(packing.size)
        if step % 3 or not live:
            packing.arrive(step, rng.uniform(0.01, rng.choice([0.2, 0.5, 1.0])))
        elif step % 2:
            packing.depart(rng.choice(live))
        else:
            item = rng.choice(live)
            packing.grow(item, min(1.0, 1.4 * packing.size[item]))
        if step % 4 == 0:
            packing.epoch()
    return hashlib.sha256(repr((packing.where, packing.moves)).encode()).hexdigest()


def test_compiled_and_plain_kernels_decide_alike():
    code = "from tests.scheduler.test_mell_kernels import digest; print(digest())"
    plain = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
    )
    assert plain.stdout.strip() == digest()


def test_choosing_mell_compiles_its_kernels():
    policy_for("mell", "auto")
    for kernel in (epoch, feasible, allocate):
        assert kernel.signatures
    before = [len(kernel.signatures) for kernel in (epoch, feasible, allocate)]
    v = view([8, 7, 5], [])
    mell.place(v, v.requests.add(request(99, num_prompt=8), KV), "m")
    mell.rebalance(v)
    assert [len(kernel.signatures) for kernel in (epoch, feasible, allocate)] == before


def test_only_moves_with_room_now_are_feasible_and_bundles_stay_together():
    items = mell.items_of(
        np.array([0.3, 0.3, 0.4, 0.2]), np.array([1, 1, 2, 2]), np.zeros(4, bool), 3
    )
    before = items.bin_of.copy()
    items.bin_of[:] = 0
    items.bundle[:] = [1, 1, 2, 3]
    found = feasible(items, before, np.array([0.2, 0.6, 0.6]))
    assert found.tolist() == [True, True, False, True]
