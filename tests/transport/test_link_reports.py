import threading

import pytest

from mellmpi.transport.links import Measured, Probe, measure_links
from mellmpi.transport.local import LocalNetwork

FOUND = {1: Measured(1e-4, 5e9), 2: Measured(3e-4, 2e9), 3: Measured(2e-4, 1e9)}


@pytest.fixture
def reported(monkeypatch):
    """(hosts) -> what rank 0 makes of what every worker found as in FOUND, and what was probed."""
    asked = []

    def measure(self, dst, budget_s, block_bytes):
        asked.append((self.transport.worker, dst, block_bytes))
        return FOUND[self.transport.worker]

    monkeypatch.setattr(Probe, "measure", measure)

    def report(*hosts):
        network, results = LocalNetwork(len(hosts)), []
        threads = [
            threading.Thread(
                target=lambda t=t: results.append(measure_links(t, ["scheduler", *hosts]))
            )
            for t in network.transports
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        [links] = [result for result in results if result is not None]
        return links, asked

    return report


def test_a_hosts_own_link_is_as_slow_as_the_slower_of_its_directions(reported):
    links, asked = reported("a", "a")
    assert (links.latency_s, links.Bps) == ((3e-4,), (2e9,))
    assert {(src, dst) for src, dst, _ in asked} == {(1, 2), (2, 1)}


def test_between_hosts_every_direction_keeps_what_its_source_found(reported):
    links, _ = reported("a", "b", "c")
    rows = zip(links.srcs, links.Bps, links.latency_s, strict=True)
    assert all((latency_s, Bps) == (FOUND[src + 1].latency_s, FOUND[src + 1].Bps)
               for src, Bps, latency_s in rows)  # fmt: skip
    assert len(links.srcs) == 6
