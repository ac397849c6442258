import threading

import pytest

from mellmpi.transport import LocalNetwork
from mellmpi.transport.probes import measure_links
from mellmpi.transport.probes.links import HostLayout
from tests.mpi import harness
from tests.mpi.harness import run_job


def measured(hosts, lose=()):
    """Measure links on a LocalNetwork, one thread per address. Returns rank 0's result and it."""
    network = LocalNetwork(len(hosts) - 1)
    results = {}

    def run(transport):
        results[transport.worker] = measure_links(transport, hosts, limit_s=0.1)

    for worker in lose:
        network.lose(worker)
    living = [t for t in network.transports if t.worker not in lose]
    threads = [threading.Thread(target=run, args=(t,), daemon=True) for t in living]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert all(results[t.worker] is None for t in living if t.worker)
    return results[0], network


def test_every_pair_of_hosts_is_measured_both_ways_and_a_host_with_itself_once():
    links, network = measured(["a", "a", "a", "b", "c", "b"])
    assert links.host_of == (0, 0, 1, 2, 1)
    expected = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert list(zip(links.srcs, links.dsts, strict=True)) == expected
    assert all(s > 0 for s in links.latency_s) and all(Bps > 0 for Bps in links.Bps)
    assert all(t.poll() == [] for t in network.transports)


def test_links_of_a_lost_worker_are_left_out_and_its_loss_is_still_reported():
    links, network = measured(["a", "a", "b", "c"], lose=[2])
    assert list(zip(links.srcs, links.dsts, strict=True)) == [(0, 2), (2, 0)]
    assert [len(network.transports[w].poll()) for w in (0, 1, 3)] == [1, 1, 1]


def test_one_worker_has_no_links():
    links, _ = measured(["a", "a"])
    assert links.host_of == (0,) and links.srcs == ()


@pytest.mark.parametrize("num_hosts", [2, 3, 4, 7, 8])
def test_rounds_are_disjoint_pairs_and_cover_every_pair_once(num_hosts):
    layout = HostLayout.of(["scheduler", *(f"h{i}" for i in range(num_hosts))])
    covered = []
    for pairs in layout.rounds():
        workers = [worker for pair in pairs for worker in pair]
        assert len(workers) == len(set(workers))
        covered += pairs
    assert len(covered) == len(set(covered)) == num_hosts * (num_hosts - 1) // 2


@pytest.mark.parametrize("flags", ["FLAGS", "OVER_TCP", "WITHOUT_CMA"])
def test_mpi_ranks_measure_all_pairs_of_hosts(flags, tmp_path):
    args = [] if flags == "FLAGS" else ["messages"]
    outcome = run_job(
        5, "tests.mpi.links", *args, directory=tmp_path, flags=getattr(harness, flags)
    )
    assert outcome.returncode == 0, outcome.output
    expected = [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1], [2, 2]]
    assert outcome.verdicts[0]["pairs"] == expected, outcome.output
    assert [v["measured"] for v in outcome.verdicts] == [True, False, False, False, False]


def test_the_measurement_ends_if_a_rank_is_killed(tmp_path):
    outcome = run_job(5, "tests.mpi.links", "lose", directory=tmp_path)
    assert outcome.verdicts[2] is None and outcome.verdicts[0], outcome.output
    assert outcome.verdicts[0]["pairs"] == [[0, 2], [2, 0], [2, 2]], outcome.output
