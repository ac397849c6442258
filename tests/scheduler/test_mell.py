"""MELL as a policy of a view, and its answers to the five gaps of the paper.

A block has 4 positions and 10 bytes; a worker has 20 blocks. Sizes include one position (2.5 bytes)
of growth.
"""

from mellmpi.protocol import ModelKv
from mellmpi.scheduler import MoveProposal, WorkerState
from mellmpi.scheduler.policies.mell import policy as mell
from mellmpi.scheduler.view import WakeWorker
from tests.scheduler.packing import Packing
from tests.scheduler.stage import KV, request
from tests.scheduler.views import view

ACTIVE, DRAINING, PARKED = WorkerState.ACTIVE, WorkerState.DRAINING, WorkerState.PARKED


def place(v, blocks, model="m"):
    row = v.requests.add(request(99, num_prompt=4 * blocks), KV)
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
    """The bins in use, each as its sorted sizes."""
    return sorted(sorted(b) for b in packing.bins())


# --- Allocate ------------------------------------------------------------------------------------


def test_a_t_goes_beside_an_l_first():
    assert place(view([3], [12], [7]), blocks=2) == 2


def test_an_s_or_m_goes_beside_a_lone_l_or_else_to_its_own_class():
    assert place(view([6], [12], [7]), blocks=6) == 2
    assert place(view([6], [12, 5], [7]), blocks=6) == 1
    assert place(view([7], [12, 5], [5]), blocks=5) == 3


def test_an_l_opens_a_worker():
    assert place(view([3], [4], []), blocks=11) == 3


def test_the_newest_worker_of_its_class_comes_first():
    assert place(view([3], [3], [4]), blocks=3) == 3


def test_a_round_counts_the_requests_by_class():
    v = view([12, 5], [7, 2])
    mell.rebalance(v)
    of_worker = v.size_classes.num[1:, 1:].T.tolist()  # T's, S's, M's, L's
    assert of_worker == [[0, 1, 0, 1], [1, 0, 1, 0]]


def test_without_a_worker_to_open_a_request_goes_wherever_it_fits():
    assert place(view([3], [8], states={1: ACTIVE}), blocks=11) == 1
    assert place(view([3], [8], [], states={3: PARKED}), blocks=11) is None  # one can be opened


def test_a_worker_with_the_most_requests_takes_no_other():
    assert place(view([1] * 8, [2]), blocks=1) == 2


def test_allocate_alone_fills_a_bin_exactly():
    assert together(packed(0.6, 0.3, 0.1)) == [[0.1, 0.3, 0.6]]


# --- the five gaps -------------------------------------------------------------------------------


def test_gap_1_m_bins_take_ts_as_well():
    assert together(packed(0.3334, 0.3334, 0.2065)) == [[0.2065, 0.3334, 0.3334]]


def test_gap_1_a_t_leaves_its_t_bin_for_an_m_bin_under_three_quarters():
    packing = packed(0.4, 0.4, 0.19, 0.2, 0.2)
    assert together(packing) == [[0.19, 0.4, 0.4], [0.2, 0.2]]
    packing.depart(2)
    assert packing.epoch() == 0  # 80 % is enough
    for item in (0, 1):
        packing.grow(item, 0.34)
    packing.size[0] = packing.size[1] = 0.34
    assert packing.epoch() == 1
    assert together(packing) == [[0.2], [0.2, 0.34, 0.34]]


def test_gap_2_an_overload_without_a_change_of_class_is_relieved():
    packing = packed(*[0.14] * 7)
    assert len(packing.bins()) == 1
    for item in range(7):
        packing.grow(item, 0.145)
    assert packing.epoch() == 1
    assert [len(b) for b in together(packing)] == [1, 6]


def test_gap_2_an_l_and_an_m_that_outgrow_their_bin_are_separated():
    packing = packed(0.55, 0.44)
    packing.grow(1, 0.46)
    assert packing.epoch() == 1
    assert together(packing) == [[0.46], [0.55]]


def test_gap_2_an_overload_is_relieved_before_it_happens():
    v = view([8, 7, 4], [5])
    assert moves(v) == []
    v.token_rate, v.period_s = 2.0, 0.5  # 3 rounds: three positions of each
    assert moves(v) == [(3, 2, "overflow")]


def test_gap_3_an_l_bin_takes_one_s_or_m_only():
    assert together(packed(0.51, 0.26, 0.26)) == [[0.26], [0.26, 0.51]]
    assert together(packed(0.51, 0.26, 0.26, 0.2)) == [[0.2, 0.26, 0.51], [0.26]]


def test_gap_4_small_ts_move_in_a_bundle_to_one_bin():
    packing = packed(*[0.02] * 42, 0.15)  # 99 %
    packing.grow(42, 0.2)
    assert packing.epoch() == 1
    assert together(packing)[0] == [0.02] * 7
    assert packing.epoch() == 0


def test_gap_4_bundles_are_formed_anew_at_each_move():
    packing = packed(*[0.06] * 15)
    for item in range(15):
        packing.grow(item, 0.072)  # 108 %: a pair is more than 1/8
    assert packing.epoch() == 1
    assert [len(b) for b in together(packing)] == [2, 13]
    packing.depart(next(i for i, b in packing.where.items() if b != packing.where[0]))
    assert packing.epoch() == 0


def test_gap_4_the_members_of_a_bundle_have_one_number():
    v = view([1, 1, 1, 1, 2, 2, 12], [], now=0.0)
    found = [p for p in mell.rebalance(v) if isinstance(p, MoveProposal)]
    assert [p.request_id for p in found] == [1, 2, 3]
    assert {p.dst for p in found} == {2} and len({p.bundle for p in found} - {None}) == 1


def test_gap_5_within_a_tier_the_fullest_worker_with_room_to_grow_comes_first():
    assert place(view([11, 1], [11, 3], [11]), blocks=2) == 2
    assert place(view([11, 1], [11, 7], [11]), blocks=2) == 1  # worker 2 would keep no room to grow
    assert place(view([11, 6], [11, 7]), blocks=2) == 1  # neither would worker 1: the emptiest


# --- the epoch -----------------------------------------------------------------------------------


def test_a_new_l_pulls_the_largest_s_or_m_that_fits():
    assert together(packed(0.35, 0.38, 0.6)) == [[0.35], [0.38, 0.6]]


def test_of_two_l_bins_the_fuller_chooses_first():
    packing = packed(0.3)
    packing.arrive(1, 0.51)
    packing.arrive(2, 0.65)
    packing.epoch()
    assert together(packing) == [[0.3, 0.65], [0.51]]


def test_an_s_or_m_displaces_ts_beside_an_l():
    packing = packed(0.55, 0.2, 0.2, 0.4)
    assert [0.4, 0.55] in [b[-2:] for b in together(packing)]


def test_a_departure_pulls_a_fitting_t_even_into_a_bin_over_three_quarters():
    packing = packed(0.2, 0.2, 0.2, 0.2, 0.16, 0.15, 0.15, 0.15)
    packing.depart(0)
    assert packing.epoch() == 1
    assert together(packing) == [[0.15, 0.15], [0.15, 0.16, 0.2, 0.2, 0.2]]
    assert packing.epoch() == 0  # nothing else departed


def test_incomplete_m_bins_are_joined():
    packing = packed(0.4, 0.4, 0.4, 0.4)
    packing.depart(0)
    packing.depart(2)
    assert packing.epoch() == 1 and together(packing) == [[0.4, 0.4]]


def test_incomplete_s_bins_are_joined_with_the_fewest_moves():
    packing = packed(*[0.3] * 6)
    for item in (0, 1, 3):
        packing.depart(item)
    assert packing.epoch() == 1 and together(packing) == [[0.3, 0.3, 0.3]]


def test_an_item_that_would_move_twice_in_an_epoch_moves_once():
    """The M that outgrows its bin would open a new one, then be joined with the other M."""
    packing = packed(0.66, 0.336, 0.42, 0.2, 0.2, 0.15)
    assert together(packing) == [[0.15, 0.2, 0.2, 0.42], [0.336, 0.66]]
    packing.grow(1, 0.345)
    assert packing.epoch() == 3  # the M, and two T's that make room for it
    assert [0.345, 0.42] in together(packing)


def test_an_overload_wakes_a_worker_when_none_is_empty():
    v = view([12, 8], [], states={2: PARKED})
    v.cost = v.cost.__class__(wake_s=0.0)
    assert mell.rebalance(v) == [WakeWorker(2)]
    assert mell.rebalance(view([12, 8], [], states={2: DRAINING})) == [WakeWorker(2)]


def test_an_overload_moves_wherever_it_fits_to_avoid_a_preemption():
    assert moves(view([12, 7, 1], [11, 4])) == [(3, 2, "overflow")]


def test_no_move_is_proposed_to_a_worker_without_room_now():
    v = view([12, 8], [11, 5, 4], [19])
    for p in mell.rebalance(v):
        assert not isinstance(p, MoveProposal) or p.dst != 2


def test_migrating_requests_are_not_moved():
    v = view([12, 4, 4], [])
    v.requests.movable[[1, 2]] = False
    assert moves(v) == []


def test_requests_move_among_workers_of_the_same_models_and_capacity():
    v = view([8, 7, 5], [], [])
    v.workers.ready(2, (ModelKv("other", 4, 10),), 200, 8, acked=0)
    assert moves(v) == [(3, 3, "overflow")]
    v = view([8, 7, 5], [], [])
    v.workers.capacity[2] = 100
    assert moves(v) == [(3, 3, "overflow")]
