import threading
from dataclasses import replace

import pytest

from mellmpi.config import Config, TransportConfig
from mellmpi.protocol import LinksMeasured
from mellmpi.runtime import connect as connecting
from mellmpi.runtime.connect import connect, lines, path
from mellmpi.transport import LocalNetwork
from mellmpi.transport.probes import HostArena


class FakeJob:
    """One rank of a job on a LocalNetwork."""

    def __init__(self, network, rank, answers):
        self.network, self.rank, self.answers = network, rank, answers
        self.hosts = ["a"] * len(network.transports)
        self.local_ranks = list(range(len(self.hosts)))
        self.asked = None

    def gather(self, data):
        return self.answers or [data] * len(self.hosts)

    def connect(self, *asked):
        self.asked = asked
        return self.network.transports[self.rank]


def connected(num_workers, answers=None, **transport):
    """Return the jobs and transports of all ranks after `connect`."""
    network = LocalNetwork(num_workers)
    jobs = [FakeJob(network, rank, answers) for rank in range(num_workers + 1)]
    config = replace(Config(), transport=TransportConfig(**transport))
    threads = [threading.Thread(target=connect, args=(job, config)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return jobs, network.transports


def test_the_first_message_to_the_scheduler_has_the_links():
    _, transports = connected(3)
    transports[1].send(0, LinksMeasured((9,), (), (), (), ()))
    [(source, links), _] = transports[0].poll()
    assert source == 0 and links.host_of == (0, 0, 0)
    assert len(links.Bps) == 1 and links.Bps[0] > 0


@pytest.mark.parametrize("num_workers, wanted", [(1, True), (2, False)])
def test_no_links_are_measured_with_one_worker_or_if_it_is_off(num_workers, wanted):
    _, transports = connected(num_workers, measure_links=wanted)
    assert all(transport.poll() == [] for transport in transports)


def test_links_are_measured_with_blocks_on_each_workers_gpu(monkeypatch):
    made, gave = [], []

    def arena(num_blocks, block_bytes, device):
        made.append(device)
        return HostArena(num_blocks, block_bytes)

    measured = connecting.measure_links
    monkeypatch.setattr(connecting, "count_gpus", lambda: 2)
    monkeypatch.setattr(connecting, "device_buffers_work", lambda device: False)
    monkeypatch.setattr(connecting, "DeviceArena", arena)
    monkeypatch.setattr(
        connecting,
        "measure_links",
        lambda transport, hosts, arena: (
            gave.append((transport.worker, type(arena))),
            measured(transport, hosts, arena=arena),
        )[1],
    )
    _, transports = connected(3)
    assert sorted(made) == ["cuda:0", "cuda:0", "cuda:1"]
    assert sorted(gave, key=lambda one: one[0]) == [
        (0, type(None)),
        *((worker, HostArena) for worker in (1, 2, 3)),
    ]
    [(_, links)] = transports[0].poll()
    assert links.Bps[0] > 0


def test_settings_reach_the_transport():
    jobs, _ = connected(1, idle_poll_s=0.5, checksums="always")
    assert [job.asked for job in jobs] == [(0.5, False, "always")] * 2


@pytest.mark.parametrize(
    "answers, proven",
    [
        ([b"\1\1", b"\1\1"], True),
        ([b"\1\1", b"\0\1"], False),  # the MPI of one host cannot
        ([b"\1\0", b"\1\1"], True),  # no GPU beside the scheduler
        ([b"\1\0", b"\1\0"], False),
    ],
)
def test_device_buffers_are_used_only_if_every_host_has_proven_them(answers, proven):
    jobs, _ = connected(1, answers)
    assert {job.asked[1] for job in jobs} == {proven}


@pytest.mark.parametrize(
    "checksums, device_buffers, proven",
    [
        ("auto", "auto", True),
        ("never", "auto", True),
        ("always", "auto", False),
        ("auto", "never", False),
    ],
)
def test_device_buffers_are_not_used_if_checksums_are_required(
    monkeypatch, checksums, device_buffers, proven
):
    monkeypatch.setattr(connecting, "count_gpus", lambda: 1)
    monkeypatch.setattr(connecting, "device_buffers_work", lambda device: True)
    transport = TransportConfig(checksums=checksums, device_buffers=device_buffers)
    job = FakeJob(LocalNetwork(1), 0, None)
    assert connecting.device_buffers_proven(job, replace(Config(), transport=transport)) is proven


@pytest.mark.parametrize(
    "hosts, far_works, tried, proven",
    [
        (["a", "a"], False, [False], True),
        (["a", "b"], True, [False, True], True),
        (["a", "b"], False, [False, True], False),
    ],
)
def test_with_several_hosts_device_buffers_must_work_between_hosts(
    monkeypatch, hosts, far_works, tried, proven
):
    asked = []

    def works(device, far=False):
        asked.append(far)
        return far_works or not far

    monkeypatch.setattr(connecting, "count_gpus", lambda: 1)
    monkeypatch.setattr(connecting, "device_buffers_work", works)
    job = FakeJob(LocalNetwork(1), 0, None)
    job.hosts = hosts
    assert connecting.device_buffers_proven(job, Config()) is proven and asked == tried


def test_the_path_of_blocks_in_words():
    gpu = replace(Config(), device="auto")
    assert "in place" in path(replace(gpu, device="cpu"), True, num_gpus=4)
    assert "pinned" in path(gpu, False, num_gpus=4)
    assert "device memory to device" in path(gpu, True, num_gpus=4)
    assert "in place" in path(gpu, False, num_gpus=0)


def test_a_link_in_words():
    links = LinksMeasured((0, 1), (0, 1), (1, 0), (1e-4, 2e-4), (1.25e9, 1e9))
    assert lines(links) == [
        "host 0 to host 1: 1250 MB/s, 100 µs",
        "host 1 to host 0: 1000 MB/s, 200 µs",
    ]
