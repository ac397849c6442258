"""Overhead of migrations: factors on waiting and work, fitted to finished migrations."""

import random

import pytest

from mellmpi.costs import CostModel, Estimates, MigrationOverhead
from mellmpi.costs.links import STALE_S

WORKS_S = (0.002, 0.02, 0.2, 2.0)
WAIT_S = 0.01


def trained(waits=2.0, stretch=1.5, num_moves=40, noise=0.0, works_s=WORKS_S, overhead=None):
    overhead, rng = overhead or MigrationOverhead(), random.Random(0)
    for i in range(num_moves):
        work_s = works_s[i % len(works_s)]
        took_s = (waits * WAIT_S + stretch * work_s) * rng.lognormvariate(0, noise)
        overhead.add(WAIT_S, work_s, took_s)
    return overhead


def test_before_any_migration_the_prediction_is_waiting_plus_work():
    assert MigrationOverhead().total_s(0.25, 1.0) == pytest.approx(1.25)


@pytest.mark.parametrize("work_s", WORKS_S)
def test_both_factors_are_found(work_s):
    assert trained().total_s(WAIT_S, work_s) == pytest.approx(0.02 + 1.5 * work_s, rel=0.15)


def test_longer_steps_lengthen_the_wait():
    assert trained().total_s(0.1, 0.02) == pytest.approx(2 * 0.1 + 1.5 * 0.02, rel=0.15)


@pytest.mark.parametrize("work_s", WORKS_S)
def test_noise_keeps_predictions_within_a_quarter(work_s):
    assert trained(noise=0.3).total_s(WAIT_S, work_s) == pytest.approx(
        0.02 + 1.5 * work_s, rel=0.25
    )


def test_mispredicted_long_migrations_hardly_change_the_prediction_for_short_ones():
    overhead = trained(waits=0.5, works_s=(0.5, 1.0, 2.0))
    assert overhead.total_s(WAIT_S, 0.002) < 0.02


def test_noisy_short_migrations_hardly_change_the_prediction_for_long_ones():
    overhead = trained(stretch=1.0, works_s=(0.001, 0.003), noise=0.2)
    assert overhead.total_s(WAIT_S, 2.0) == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize("factor", [0.01, 0.0, 100.0])
def test_one_outlier_changes_little(factor):
    overhead = trained()
    before_s = [overhead.total_s(WAIT_S, work_s) for work_s in WORKS_S]
    overhead.add(WAIT_S, 0.2, factor * overhead.total_s(WAIT_S, 0.2))
    after_s = [overhead.total_s(WAIT_S, work_s) for work_s in WORKS_S]
    assert after_s == pytest.approx(before_s, rel=0.35)


def test_a_very_long_first_migration_is_not_taken_as_typical():
    overhead = MigrationOverhead()
    overhead.add(WAIT_S, 0.001, 1.5)  # behind a long prefill
    assert overhead.total_s(WAIT_S, 0.001) < 4 * (WAIT_S + 0.001)
    for _ in range(5):
        overhead.add(WAIT_S, 0.001, WAIT_S)
    assert overhead.total_s(WAIT_S, 0.001) < 1.7 * WAIT_S


def test_a_change_is_followed_within_fifteen_migrations():
    overhead = trained(num_moves=15, stretch=3.0, works_s=(2.0,), overhead=trained())
    assert overhead.total_s(WAIT_S, 2.0) == pytest.approx(0.02 + 3.0 * 2.0, rel=0.2)


@pytest.fixture
def estimates():
    return Estimates(CostModel())


def train(estimates, hosts, took_s=3.0):
    for _ in range(20):
        estimates.record_move("split", hosts, 0.001, 1.0, took_s)


def test_a_pair_of_hosts_starts_with_the_overhead_of_all_pairs(estimates):
    train(estimates, (0, 1))
    assert estimates.move_s("split", (2, 3), 0.001, 1.0) == pytest.approx(3.0, rel=0.15)
    assert estimates.move_s("transfer", (0, 1), 0.001, 1.0) == pytest.approx(1.001)
    train(estimates, (2, 3), 1.5)
    assert estimates.move_s("split", (2, 3), 0.001, 1.0) == pytest.approx(1.5, rel=0.1)
    assert estimates.move_s("split", (0, 1), 0.001, 1.0) == pytest.approx(3.0, rel=0.1)


def test_the_overhead_of_an_unused_mode_is_forgotten(estimates):
    train(estimates, (0, 1))
    estimates.forget_stale(STALE_S / 2)
    assert estimates.move_s("split", (0, 1), 0.001, 1.0) == pytest.approx(3.0, rel=0.1)
    estimates.forget_stale(STALE_S)
    assert estimates.move_s("split", (0, 1), 0.001, 1.0) == pytest.approx(3.0, rel=0.1)
    for i in range(2, 10):
        estimates.forget_stale(i * STALE_S)
    assert estimates.move_s("split", (0, 1), 0.001, 1.0) < 1.3


def test_the_overhead_of_a_used_mode_is_not_forgotten():
    overhead = MigrationOverhead()
    for _ in range(30):
        overhead.add(WAIT_S, 2.0, 0.02 + 1.5 * 2.0)
        overhead.age()
    assert overhead.total_s(WAIT_S, 2.0) == pytest.approx(0.02 + 1.5 * 2.0, rel=0.04)
