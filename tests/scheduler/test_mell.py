"""MELL as a policy of a view, and where it closes gaps of the paper.

A block is 4 positions or 10 bytes; a worker has 20. Sizes count one more position (2.5 bytes).
"""

import hashlib
import os
import random
import subprocess
import sys

import numpy as np

from mellmpi.protocol import ModelKv
from mellmpi.scheduler import MoveProposal, WorkerState
from mellmpi.scheduler.policies import policy_for
from mellmpi.scheduler.policies.mell import policy as mell
from mellmpi.scheduler.policies.mell.epoch import doable, epoch
from mellmpi.scheduler.policies.mell.kernels import OPENED, allocate
from mellmpi.scheduler.view import WakeWorker
from tests.scheduler.packing import Packing
from tests.scheduler.stage import KV, request
from tests.scheduler.views import view

ACTIVE, DRAINING, PARKED = WorkerState.ACTIVE, WorkerState.DRAINING, WorkerState.PARKED


def place(v, blocks, model="m"):
    row = v.requests.add(request(99, num_prompt=4 * blocks), 0.0, KV)
    found = mell.place(v, row, model)
    v.requests.drop(row)
    return found


def moves(v):
    return [
        (p.request_id, p.dst, p.reason) for p in mell.rebalance(v) if isinstance(p, MoveProposal)
    ]


def packed(*sizes):
    packing = Packing()
    for i, size in enumerate(sizes):
        packing.arrive(i, size)
        packing.epoch()
    return packing


def together(packing):
    """The bins in use, as sorted lists of sizes."""
    return sorted(sorted(b) for b in packing.bins())


# --- Allocate ------------------------------------------------------------------------------------


def test_a_small_one_goes_beside_a_large_one_first():
    assert place(view([3], [12], [7]), blocks=2) == 2


def test_an_s_or_m_goes_beside_an_l_without_one_then_to_its_own_class():
    assert place(view([6], [12], [7]), blocks=6) == 2
    assert place(view([6], [12, 5], [7]), blocks=6) == 1
    assert place(view([7], [12, 5], [5]), blocks=5) == 3


def test_a_large_one_opens_a_worker():
    assert place(view([3], [4], []), blocks=11) == 3


def test_the_newest_of_its_class_comes_first():
    assert place(view([3], [3], [4]), blocks=3) == 3


def test_after_a_round_the_class_of_every_request_is_known_to_placement():
    v = view([12, 5], [7, 2])
    mell.rebalance(v)
    of_worker = v.size_classes.num[1:, 1:].T.tolist()  # T's, S's, M's, L's
    assert of_worker == [[0, 1, 0, 1], [1, 0, 1, 0]]


def test_with_no_worker_to_open_it_goes_wherever_it_fits():
    assert place(view([3], [8], states={1: ACTIVE}), blocks=11) == 1
    assert place(view([3], [8], [], states={3: PARKED}), blocks=11) is None  # one can be opened


def test_seats_are_room_too():
    assert place(view([1] * 8, [2]), blocks=1) == 2


# --- the five gaps -------------------------------------------------------------------------------


def test_gap_1_m_gpus_take_small_ones_as_well():
    assert together(packed(0.3334, 0.3334, 0.2065)) == [[0.2065, 0.3334, 0.3334]]


def test_gap_1_a_small_one_leaves_its_own_gpu_for_an_m_gpu_that_is_not_three_quarters_full():
    packing = packed(0.4, 0.4, 0.19, 0.2, 0.2)
    assert together(packing) == [[0.19, 0.4, 0.4], [0.2, 0.2]]
    packing.depart(2)
    assert packing.epoch() == 0  # 80 % will do
    for item in (0, 1):
        packing.grow(item, 0.34)
    packing.size[0] = packing.size[1] = 0.34
    assert packing.epoch() == 1
    assert together(packing) == [[0.2], [0.2, 0.34, 0.34]]


def test_gap_2_overload_without_a_change_of_class_is_cured():
    packing = packed(*[0.14] * 7)
    assert len(packing.bins()) == 1
    for item in range(7):
        packing.grow(item, 0.145)
    assert packing.epoch() == 1
    assert [len(b) for b in together(packing)] == [1, 6]


def test_gap_2_an_l_and_an_m_that_outgrow_their_gpu_part():
    packing = packed(0.55, 0.44)
    packing.grow(1, 0.46)
    assert packing.epoch() == 1
    assert together(packing) == [[0.46], [0.55]]


def test_gap_2_an_overload_is_cured_before_it_happens():
    v = view([8, 7, 4], [5])
    assert moves(v) == []
    v.token_rate, v.period_s = 2.0, 0.5  # 3 rounds: three positions of each
    assert moves(v) == [(3, 2, "overflow")]


def test_gap_3_an_l_gpu_takes_one_s_or_m_only():
    assert together(packed(0.51, 0.26, 0.26)) == [[0.26], [0.26, 0.51]]
    assert together(packed(0.51, 0.26, 0.26, 0.2)) == [[0.2, 0.26, 0.51], [0.26]]


def test_gap_4_the_small_ones_travel_in_bundles_to_one_place():
    packing = packed(*[0.02] * 42, 0.15)  # 99 %
    packing.grow(42, 0.2)
    assert packing.epoch() == 1
    assert together(packing)[0] == [0.02] * 7
    assert packing.epoch() == 0


def test_gap_4_a_bundle_that_grew_or_lost_members_is_formed_anew_when_it_moves():
    packing = packed(*[0.06] * 15)
    for item in range(15):
        packing.grow(item, 0.072)  # 108 %: a pair is more than 1/8
    assert packing.epoch() == 1
    assert [len(b) for b in together(packing)] == [2, 13]
    packing.depart(next(i for i, b in packing.where.items() if b != packing.where[0]))
    assert packing.epoch() == 0


def test_gap_4_the_members_of_a_bundle_bear_one_number():
    v = view([1, 1, 1, 1, 2, 2, 12], [], now=0.0)
    found = [p for p in mell.rebalance(v) if isinstance(p, MoveProposal)]
    assert [p.request_id for p in found] == [1, 2, 3]
    assert {p.dst for p in found} == {2} and len({p.bundle for p in found} - {None}) == 1


def test_gap_5_within_a_class_the_fullest_that_keeps_room_to_grow_comes_first():
    assert place(view([11, 1], [11, 3], [11]), blocks=2) == 2
    assert place(view([11, 1], [11, 7], [11]), blocks=2) == 1  # no room would be left on 2
    assert place(view([11, 6], [11, 7]), blocks=2) == 1  # nor anywhere: the emptiest


# --- the epoch -----------------------------------------------------------------------------------


def test_a_new_l_pulls_the_largest_s_or_m_that_fits():
    assert together(packed(0.35, 0.38, 0.6)) == [[0.35], [0.38, 0.6]]


def test_of_two_l_gpus_the_fuller_chooses_first():
    packing = packed(0.3)
    packing.arrive(1, 0.51)
    packing.arrive(2, 0.65)
    packing.epoch()
    assert together(packing) == [[0.3, 0.65], [0.51]]


def test_an_s_or_m_displaces_small_ones_beside_an_l():
    packing = packed(0.55, 0.2, 0.2, 0.4)
    assert [0.4, 0.55] in [b[-2:] for b in together(packing)]


def test_for_what_departs_a_fitting_t_is_pulled_also_into_a_gpu_over_three_quarters():
    packing = packed(0.2, 0.2, 0.2, 0.2, 0.16, 0.15, 0.15, 0.15)
    packing.depart(0)
    assert packing.epoch() == 1
    assert together(packing) == [[0.15, 0.15], [0.15, 0.16, 0.2, 0.2, 0.2]]
    assert packing.epoch() == 0  # nothing else departed


def test_gpus_that_lack_an_m_are_joined():
    packing = packed(0.4, 0.4, 0.4, 0.4)
    packing.depart(0)
    packing.depart(2)
    assert packing.epoch() == 1 and together(packing) == [[0.4, 0.4]]


def test_gpus_that_lack_s_are_joined_by_the_fewest_moves():
    packing = packed(*[0.3] * 6)
    for item in (0, 1, 3):
        packing.depart(item)
    assert packing.epoch() == 1 and together(packing) == [[0.3, 0.3, 0.3]]


def test_what_moves_twice_in_an_epoch_is_moved_once():
    """The M that outgrows its GPU would open one, and then be joined with the other M."""
    packing = packed(0.66, 0.336, 0.42, 0.2, 0.2, 0.15)
    assert together(packing) == [[0.15, 0.2, 0.2, 0.42], [0.336, 0.66]]
    packing.grow(1, 0.345)
    assert packing.epoch() == 3  # of it, and of two that make room
    assert [0.345, 0.42] in together(packing)


def test_overload_wakes_a_worker_when_none_is_empty():
    v = view([12, 8], [], states={2: PARKED})
    v.cost = v.cost.__class__(wake_s=0.0)
    assert mell.rebalance(v) == [WakeWorker(2)]
    assert mell.rebalance(view([12, 8], [], states={2: DRAINING})) == [WakeWorker(2)]


def test_an_overload_goes_anywhere_rather_than_being_preempted():
    assert moves(view([12, 7, 1], [11, 4])) == [(3, 2, "overflow")]


def test_no_move_is_proposed_that_has_no_room_at_once():
    v = view([12, 8], [11, 5, 4], [19])
    for p in mell.rebalance(v):
        assert not isinstance(p, MoveProposal) or p.dst != 2


def test_what_is_on_the_move_stays_where_it_is():
    v = view([12, 4, 4], [])
    v.requests.movable[[1, 2]] = False
    assert moves(v) == []


def test_requests_move_among_workers_of_the_same_models_and_size():
    v = view([8, 7, 5], [], [])
    v.workers.ready(2, (ModelKv("other", 4, 10),), 200, 8, acked=0)
    assert moves(v) == [(3, 3, "overflow")]
    v = view([8, 7, 5], [], [])
    v.workers.capacity[2] = 100
    assert moves(v) == [(3, 3, "overflow")]


# --- kernels -------------------------------------------------------------------------------------


def digest():
    """Of where everything is after some hundred operations."""
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


def test_the_kernels_decide_as_their_plain_python_does():
    code = "from tests.scheduler.test_mell import digest; print(digest())"
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
    for kernel in (epoch, doable, allocate):
        assert kernel.signatures
    before = [len(kernel.signatures) for kernel in (epoch, doable, allocate)]
    v = view([8, 7, 5], [])
    place(v, blocks=2)
    mell.rebalance(v)
    assert [len(kernel.signatures) for kernel in (epoch, doable, allocate)] == before


def test_only_moves_with_room_now_are_doable_and_pieces_stay_whole():
    items = mell.items_of(
        np.array([0.3, 0.3, 0.4, 0.2]), np.array([1, 1, 2, 2]), np.zeros(4, bool), 3
    )
    before = items.where.copy()
    items.where[:] = 0
    items.piece[:] = [1, 1, 2, 3]
    found = doable(items, before, np.array([0.2, 0.6, 0.6]))
    assert found.tolist() == [True, True, False, True]


def test_a_packing_that_fits_is_found_by_targets_alone():
    assert OPENED == 3
    assert together(packed(0.6, 0.3, 0.1)) == [[0.1, 0.3, 0.6]]
