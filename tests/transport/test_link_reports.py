import threading

import pytest

from mellmpi.transport import LocalNetwork
from mellmpi.transport.probes import BLOCK_BYTES, NUM_BLOCKS, Probe, measure_links
from mellmpi.transport.probes import links as links_module
from mellmpi.transport.probes.links import LIMIT_S, LinkSpeed

FOUND = {1: LinkSpeed(1e-4, 5e9), 2: LinkSpeed(3e-4, 2e9), 3: LinkSpeed(2e-4, 1e9)}


@pytest.fixture
def reported(monkeypatch):
    """(hosts) -> the result at rank 0 if workers measure FOUND, and the calls of `measure`."""
    measured = []

    def measure(self, dst, budget_s, block_bytes):
        measured.append((self.transport.worker, dst, budget_s))
        return FOUND.get(self.transport.worker, FOUND[1])

    monkeypatch.setattr(Probe, "measure", measure)

    def report(*hosts):
        network, results = LocalNetwork(len(hosts)), []
        threads = [
            threading.Thread(
                target=lambda t=t: results.append(measure_links(t, ["scheduler", *hosts])),
                daemon=True,
            )
            for t in network.transports
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        [links] = [result for result in results if result is not None]
        return links, measured

    return report


def test_a_link_within_a_host_gets_the_slower_of_its_directions(reported):
    links, measured = reported("a", "a")
    assert (links.latency_s, links.Bps) == ((3e-4,), (2e9,))
    assert {(src, dst) for src, dst, _ in measured} == {(1, 2), (2, 1)}


def test_between_hosts_every_direction_has_the_result_of_its_source(reported):
    links, _ = reported("a", "b", "c")
    rows = zip(links.srcs, links.Bps, links.latency_s, strict=True)
    assert all(
        (latency_s, Bps) == (FOUND[src + 1].latency_s, FOUND[src + 1].Bps)
        for src, Bps, latency_s in rows
    )
    assert len(links.srcs) == 6


def test_all_pairs_get_the_same_share_of_the_time(reported):
    _, measured = reported("a", "a", "b", "c", "d")
    num_rounds = 1 + 3  # within hosts, between 4 hosts; each measures both directions
    assert {budget_s for _, _, budget_s in measured} == {LIMIT_S / (2 * num_rounds)}


class Link(Probe):
    """A simulated link of this latency and bandwidth, with its own clock."""

    def __init__(self, latency_s, Bps):
        self.latency_s, self.Bps, self.now, self.sizes = latency_s, Bps, 0.0, []

    def round_trip_s(self, dst):
        self.now += 2 * self.latency_s
        return 2 * self.latency_s

    def transfer_s(self, dst, block_ids):
        self.sizes.append(len(block_ids))
        took_s = 2 * self.latency_s + len(block_ids) * BLOCK_BYTES / self.Bps
        self.now += took_s
        return took_s


@pytest.mark.parametrize("latency_s, Bps", [(50e-6, 10e9), (1e-3, 1.2e9), (200e-6, 120e6)])
@pytest.mark.parametrize("budget_s", [0.5, 0.1])
def test_latency_and_bandwidth_are_measured_within_the_budget(
    monkeypatch, latency_s, Bps, budget_s
):
    link = Link(latency_s, Bps)
    monkeypatch.setattr(links_module.time, "perf_counter", lambda: link.now)
    found = link.measure(1, budget_s, BLOCK_BYTES)
    assert found.latency_s == pytest.approx(latency_s) and found.Bps == pytest.approx(Bps, rel=0.1)
    assert link.now < 1.1 * budget_s
    fits = budget_s > 5 * NUM_BLOCKS * BLOCK_BYTES / Bps
    assert (max(link.sizes) == NUM_BLOCKS) or not fits


def test_a_slow_link_is_measured_with_single_blocks(monkeypatch):
    link = Link(1e-3, 50e6)
    monkeypatch.setattr(links_module.time, "perf_counter", lambda: link.now)
    link.measure(1, 0.05, BLOCK_BYTES)
    assert link.sizes == [1, 1, 1]


def test_a_tenth_of_the_time_is_for_small_messages(monkeypatch):
    link, trips = Link(1e-3, 1e9), []
    monkeypatch.setattr(links_module.time, "perf_counter", lambda: link.now)
    monkeypatch.setattr(
        Link,
        "round_trip_s",
        lambda self, dst: (trips.append(1), setattr(self, "now", self.now + 1e-3), 1e-3)[2],
    )
    link.measure(1, 0.2, BLOCK_BYTES)
    assert 15 <= len(trips) <= 25
