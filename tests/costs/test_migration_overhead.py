"""What moves take beyond what is expected of them: factors of waiting and work, from moves."""

import random

import pytest

from mellmpi.costs import CostModel, Estimates, MigrationOverhead
from mellmpi.costs.links import LOOK_AGAIN_S

WORKS_S = (0.002, 0.02, 0.2, 2.0)
WAIT_S = 0.01


def taught(waits=2.0, stretch=1.5, num_moves=40, noise=0.0, works_s=WORKS_S, beyond=None):
    beyond, rng = beyond or MigrationOverhead(), random.Random(0)
    for i in range(num_moves):
        work_s = works_s[i % len(works_s)]
        took_s = (waits * WAIT_S + stretch * work_s) * rng.lognormvariate(0, noise)
        beyond.add(WAIT_S, work_s, took_s)
    return beyond


def test_before_any_move_it_takes_what_is_expected_of_its_waiting_and_its_work():
    assert MigrationOverhead().took_s(0.25, 1.0) == pytest.approx(1.25)


@pytest.mark.parametrize("work_s", WORKS_S)
def test_what_is_waited_and_what_is_stretched_are_told_apart(work_s):
    assert taught().took_s(WAIT_S, work_s) == pytest.approx(0.02 + 1.5 * work_s, rel=0.15)


def test_where_steps_take_longer_more_is_waited():
    assert taught().took_s(0.1, 0.02) == pytest.approx(2 * 0.1 + 1.5 * 0.02, rel=0.15)


@pytest.mark.parametrize("work_s", WORKS_S)
def test_noise_leaves_predictions_within_a_quarter(work_s):
    assert taught(noise=0.3).took_s(WAIT_S, work_s) == pytest.approx(0.02 + 1.5 * work_s, rel=0.25)


def test_long_moves_that_were_mispredicted_say_little_of_short_ones():
    beyond = taught(waits=0.5, works_s=(0.5, 1.0, 2.0))
    assert beyond.took_s(WAIT_S, 0.002) < 0.02


def test_short_moves_with_much_around_them_say_little_of_long_ones():
    beyond = taught(stretch=1.0, works_s=(0.001, 0.003), noise=0.2)
    assert beyond.took_s(WAIT_S, 2.0) == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize("factor", [0.01, 0.0, 100.0])
def test_one_move_that_took_very_long_or_next_to_no_time_changes_little(factor):
    beyond = taught()
    before_s = [beyond.took_s(WAIT_S, work_s) for work_s in WORKS_S]
    beyond.add(WAIT_S, 0.2, factor * beyond.took_s(WAIT_S, 0.2))
    after_s = [beyond.took_s(WAIT_S, work_s) for work_s in WORKS_S]
    assert after_s == pytest.approx(before_s, rel=0.35)


def test_a_first_move_that_took_very_long_is_no_measure_of_those_to_come():
    beyond = MigrationOverhead()
    beyond.add(WAIT_S, 0.001, 1.5)  # behind a long prefill
    assert beyond.took_s(WAIT_S, 0.001) < 4 * (WAIT_S + 0.001)
    for _ in range(5):
        beyond.add(WAIT_S, 0.001, WAIT_S)
    assert beyond.took_s(WAIT_S, 0.001) < 1.7 * WAIT_S


def test_a_change_is_followed_within_some_moves():
    beyond = taught(num_moves=15, stretch=3.0, works_s=(2.0,), beyond=taught())
    assert beyond.took_s(WAIT_S, 2.0) == pytest.approx(0.02 + 3.0 * 2.0, rel=0.2)


@pytest.fixture
def estimates():
    return Estimates(CostModel())


def teach(estimates, hosts, took_s=3.0):
    for _ in range(20):
        estimates.took("split", hosts, 0.001, 1.0, took_s)


def test_a_pair_of_hosts_is_like_the_others_until_it_has_moves_of_its_own(estimates):
    teach(estimates, (0, 1))
    assert estimates.move_s("split", (2, 3), 0.001, 1.0) == pytest.approx(3.0, rel=0.15)
    assert estimates.move_s("transfer", (0, 1), 0.001, 1.0) == pytest.approx(1.001)
    teach(estimates, (2, 3), 1.5)
    assert estimates.move_s("split", (2, 3), 0.001, 1.0) == pytest.approx(1.5, rel=0.1)
    assert estimates.move_s("split", (0, 1), 0.001, 1.0) == pytest.approx(3.0, rel=0.1)


def test_a_way_that_was_bad_is_tried_again_in_the_end(estimates):
    teach(estimates, (0, 1))
    estimates.look_again(LOOK_AGAIN_S / 2)
    assert estimates.move_s("split", (0, 1), 0.001, 1.0) == pytest.approx(3.0, rel=0.1)
    estimates.look_again(LOOK_AGAIN_S)
    assert estimates.move_s("split", (0, 1), 0.001, 1.0) == pytest.approx(3.0, rel=0.1)
    for i in range(2, 10):
        estimates.look_again(i * LOOK_AGAIN_S)
    assert estimates.move_s("split", (0, 1), 0.001, 1.0) < 1.3


def test_what_is_tried_now_and_then_is_not_forgotten():
    beyond = MigrationOverhead()
    for _ in range(30):
        beyond.add(WAIT_S, 2.0, 0.02 + 1.5 * 2.0)
        beyond.age()
    assert beyond.took_s(WAIT_S, 2.0) == pytest.approx(0.02 + 1.5 * 2.0, rel=0.04)
