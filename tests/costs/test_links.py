"""Estimates of links: the measurement at the start, then the transfers of migrations."""

import random

import pytest

from mellmpi.costs import Link, Links
from mellmpi.costs.links import STALE_S, WINDOW
from mellmpi.protocol import LinksMeasured

GUESS = Link(1e-3, 1e9)
MEASURED = LinksMeasured((0, 0, 1), (0, 0, 1), (0, 1, 0), (1e-4, 5e-4, 6e-4), (8e9, 1e8, 2e8))


def link(latency_s, Bps):
    return Link(latency_s, pytest.approx(Bps))


@pytest.fixture
def links():
    links = Links(GUESS)
    links.measured(MEASURED)
    return links


def test_a_measurement_applies_to_all_workers_of_its_two_hosts(links):
    assert links.between(1, 2) == links.between(2, 1) == link(1e-4, 8e9)
    assert links.between(1, 3) == links.between(2, 3) == link(5e-4, 1e8)
    assert links.between(3, 1) == link(6e-4, 2e8)


def test_an_unmeasured_link_is_guessed():
    assert Links(GUESS).between(1, 2) == GUESS


def test_a_first_migration_over_an_unmeasured_link_counts_as_much_as_the_guess():
    links = Links(GUESS)
    links.record_transfer(1, 2, 10**8, 1.0 + GUESS.latency_s, 0.0)
    assert links.between(1, 2).Bps == pytest.approx(2 / (1e-9 + 1e-8))


def test_a_link_ten_times_slower_is_seen_within_three_migrations(links):
    for _ in range(3):
        links.record_transfer(1, 3, 10**8, 10.0, 0.0)
    assert links.between(1, 3).Bps == pytest.approx(1e7, rel=0.01)
    assert links.between(3, 1).Bps == pytest.approx(2e8)


def test_two_slow_migrations_alone_change_nothing(links):
    for _ in range(2):
        links.record_transfer(1, 3, 10**8, 10.0, 0.0)
    assert links.between(1, 3).Bps == pytest.approx(1e8)


def test_small_transfers_update_the_latency_and_not_the_bandwidth(links):
    for _ in range(WINDOW):
        links.record_transfer(1, 3, 1000, 1e-3, 0.0)
    assert links.between(1, 3).latency_s == pytest.approx(1e-3 - 1000 / 1e8)
    assert links.between(1, 3).Bps == pytest.approx(1e8)


@pytest.mark.parametrize(("num_bytes", "transfer_s"), [(0, 1.0), (100, 0.0)])
def test_a_transfer_without_bytes_or_duration_is_ignored(links, num_bytes, transfer_s):
    links.record_transfer(1, 3, num_bytes, transfer_s, 0.0)
    assert links.between(1, 3) == link(5e-4, 1e8)


def test_an_unused_link_returns_to_its_initial_estimate(links):
    for _ in range(WINDOW):
        links.record_transfer(1, 3, 10**8, 10.0, now=0.0)
    for i in range(1, 3):
        links.forget_stale(i * STALE_S)
    assert links.between(1, 3).Bps == pytest.approx(1e7, rel=0.01)
    links.forget_stale(2.5 * STALE_S)  # less than STALE_S after the second call
    assert links.between(1, 3).Bps == pytest.approx(1e7, rel=0.01)
    links.forget_stale(3 * STALE_S)
    assert links.between(1, 3).Bps == pytest.approx(1e8)


def test_noise_of_a_factor_two_leaves_the_estimate_within_a_factor_one_and_a_half(links):
    rng, wrong = random.Random(0), 0
    for _ in range(200):
        links.record_transfer(1, 3, 10**8, 2.0 * rng.choice([0.5, 0.8, 1.0, 1.25, 2.0]), 0.0)
        wrong += not 1 / 1.5 < links.between(1, 3).Bps / 5e7 < 1.5
    assert wrong < 40


def test_bandwidths_are_those_of_the_estimates(links):
    before = {(src, dst): Bps for src, dst, Bps in links.bandwidths()}
    assert before[links.hosts(1, 3)] == links.between(1, 3).Bps
    for _ in range(WINDOW):
        links.record_transfer(1, 3, 10**8, 10.0, now=0.0)
    after = {(src, dst): Bps for src, dst, Bps in links.bandwidths()}
    changed = {hosts for hosts in before if after[hosts] != before[hosts]}
    assert changed == {links.hosts(1, 3)} and after[links.hosts(1, 3)] == links.between(1, 3).Bps
