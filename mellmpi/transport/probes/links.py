"""Measures the links between hosts at the start of a job, with real transfers.

All workers of a job call `measure_links`. Hosts are measured in disjoint pairs, and every pair gets
the same share of the time. The first worker of each host measures; the link within a host (shared
memory) is measured between its first two workers.
"""

import mmap
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from mellmpi.protocol import SCHEDULER, LinkProbe, LinkProbed, LinksMeasured, WorkerLost
from mellmpi.transport.base import Arena, Transfer, Transport

LIMIT_S = 1.0  # for all pairs of hosts together
BLOCK_BYTES = 512 << 10
NUM_BLOCKS = 32  # of the largest transfer of a probe
SMALL_SHARE = 0.1  # of the time of one direction is for small messages
REPEATS = 3  # of the largest transfer that fits into the time
SLEEP_S = 1.0  # longest wait between polls; every message ends it
TAG = 0  # not used by migrations: epochs begin at 1

T = TypeVar("T", bound=LinkProbe | LinkProbed | LinksMeasured)


class HostArena:
    """Blocks in host memory, for probes. Aligned to pages, as the KV cache is: copies of unaligned
    blocks take 1.5 times as long."""

    device = "cpu"

    def __init__(self, num_blocks: int, block_bytes: int):
        memory = mmap.mmap(-1, num_blocks * block_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.blocks = np.frombuffer(memory, np.uint8).reshape(num_blocks, block_bytes)
        self.blocks[:] = 1  # makes the pages resident
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.address = self.blocks.ctypes.data


class PeerLost(Exception):
    """The other worker of a measurement is lost."""


@dataclass(frozen=True)
class LinkSpeed:
    """Speed of one direction of a link."""

    latency_s: float  # one way, of a small message
    Bps: float  # bytes per second of blocks, latency excluded


class Probe:
    """Measures the links of one worker; keeps all messages that do not belong to it."""

    def __init__(self, transport: Transport):
        self.transport = transport
        self.other_messages: list[tuple[int, Any]] = []
        self.lost: set[int] = set()
        self._received: list[tuple[int, LinkProbe | LinkProbed | LinksMeasured]] = []

    def receive(self, src: int, kind: type[T]) -> T:
        """Returns the next message of this kind from `src`; raises PeerLost."""
        while True:
            for i, (source, message) in enumerate(self._received):
                if source == src and isinstance(message, kind):
                    del self._received[i]
                    return message
            if src in self.lost:
                raise PeerLost(src)
            self._poll()

    def _poll(self) -> None:
        messages = self.transport.poll()
        for source, message in messages:
            if isinstance(message, LinkProbe | LinkProbed | LinksMeasured):
                self._received.append((source, message))
                continue
            if isinstance(message, WorkerLost):
                self.lost.add(message.worker)
            self.other_messages.append((source, message))
        if not messages and not self.transport.progress():
            self.transport.wait(SLEEP_S)

    def _finish(self, transfer: Transfer) -> None:
        while not transfer.done:
            self._poll()
        if transfer.failed:
            raise PeerLost

    # --- at the measuring end -------------------------------------------------------------------

    def round_trip_s(self, dst: int) -> float:
        """Seconds of a small message and its answer."""
        started_s = time.perf_counter()
        self.transport.send(dst, LinkProbe(0, False))
        self.receive(dst, LinkProbed)
        return time.perf_counter() - started_s

    def transfer_s(self, dst: int, block_ids: Sequence[int]) -> float:
        """Seconds to send these blocks after a header, as in a migration, and to get the answer."""
        started_s = time.perf_counter()
        self.transport.send(dst, LinkProbe(len(block_ids), False))
        transfer = self.transport.send_blocks(dst, TAG, block_ids)
        self.receive(dst, LinkProbed)
        elapsed_s = time.perf_counter() - started_s
        self._finish(transfer)
        return elapsed_s

    def measure(self, dst: int, budget_s: float, block_bytes: int) -> LinkSpeed:
        """Measure the link to `dst` for about `budget_s`; needs an arena of NUM_BLOCKS blocks."""
        stop_s = time.perf_counter() + budget_s
        small_until_s = time.perf_counter() + SMALL_SHARE * budget_s
        trips = [self.round_trip_s(dst) for _ in range(2)][1:]  # the first opens the connection
        while time.perf_counter() < small_until_s and len(trips) < 100:
            trips.append(self.round_trip_s(dst))
        trip_s = statistics.median(trips)
        num_blocks = 1
        self.transfer_s(dst, range(1))  # warm-up
        took = [self.transfer_s(dst, range(1))]
        while num_blocks < NUM_BLOCKS and time.perf_counter() + 3 * took[-1] < stop_s:
            num_blocks *= 2
            took = [self.transfer_s(dst, range(num_blocks))]
        while len(took) < REPEATS and time.perf_counter() + took[-1] < stop_s:
            took.append(self.transfer_s(dst, range(num_blocks)))
        spent_s = statistics.median(took) - trip_s
        num_bytes = num_blocks * block_bytes
        return LinkSpeed(trip_s / 2, num_bytes / max(spent_s, 0.1 * statistics.median(took)))

    def end(self, dst: int) -> None:
        """End the `answer` of `dst`."""
        self.transport.send(dst, LinkProbe(0, True))

    # --- at the answering end -------------------------------------------------------------------

    def answer(self, src: int, block_ids: Sequence[int]) -> None:
        """Answer all probes of `src` until its `end`; receives into `block_ids`, in order."""
        while not (probe := self.receive(src, LinkProbe)).done:
            if probe.num_blocks:
                transfer = self.transport.receive_blocks(src, TAG, block_ids[: probe.num_blocks])
                self._finish(transfer)
            self.transport.send(src, LinkProbed())


@dataclass(frozen=True)
class HostLayout:
    """Hosts of workers: `host_of[worker - 1]` is the index of the host, in order of appearance."""

    host_of: tuple[int, ...]

    @staticmethod
    def of(hosts: Sequence[str]) -> "HostLayout":
        """`hosts`: the name of the host of every address, the scheduler's first."""
        names = list(dict.fromkeys(hosts[1:]))
        return HostLayout(tuple(names.index(host) for host in hosts[1:]))

    @property
    def num_hosts(self) -> int:
        return max(self.host_of, default=-1) + 1

    def workers_on(self, host: int) -> list[int]:
        return [i + 1 for i, other in enumerate(self.host_of) if other == host]

    def rounds(self) -> Iterator[list[tuple[int, int]]]:
        """Yields rounds of disjoint pairs of workers: first within each host, then between hosts.

        Between hosts: the circle method of round-robin tournaments.
        """
        own = [self.workers_on(host) for host in range(self.num_hosts)]
        yield [(workers[0], workers[1]) for workers in own if len(workers) > 1]
        firsts: list[int | None] = [workers[0] for workers in own]
        if len(firsts) % 2:
            firsts.append(None)
        for _ in range(len(firsts) - 1):
            pairs = zip(firsts[: len(firsts) // 2], reversed(firsts), strict=False)
            yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
            firsts = [firsts[0], firsts[-1], *firsts[1:-1]]


def measure_links(
    transport: Transport, hosts: Sequence[str], limit_s: float = LIMIT_S, arena: Arena | None = None
) -> LinksMeasured | None:
    """Measure the links between all hosts, in both directions.

    Returns the result at the scheduler, None elsewhere. Every address calls it before it sends
    anything else. Takes about `limit_s`. Links of lost workers are left out.

    hosts  the host of every address, the scheduler's first
    arena  NUM_BLOCKS blocks or more in the memory that migrations will use; None: a HostArena
    """
    layout, probe = HostLayout.of(hosts), Probe(transport)
    rounds = [pairs for pairs in layout.rounds() if pairs]
    if transport.worker == SCHEDULER:
        measuring = sorted({worker for pairs in rounds for pair in pairs for worker in pair})
        measured = _collect(probe, layout, measuring)
        _put_back(probe)
        return measured
    arena = arena or HostArena(NUM_BLOCKS, BLOCK_BYTES)
    transport.attach(arena)
    rows = []
    budget_s = limit_s / max(1, 2 * len(rounds))
    for a, b in (pair for pairs in rounds for pair in pairs if transport.worker in pair):
        peer = b if transport.worker == a else a
        try:
            rows += _measure_both_ways(probe, peer, transport.worker == a, budget_s, arena)
        except PeerLost:
            continue
    transport.attach(None)
    if any(transport.worker in pair for pairs in rounds for pair in pairs):
        transport.send(SCHEDULER, _packed(layout, rows, transport.worker))
    _put_back(probe)
    return None


def _measure_both_ways(
    probe: Probe, peer: int, first: bool, budget_s: float, arena: Arena
) -> list[tuple[int, LinkSpeed]]:
    """Measure the direction to `peer`, and answer it for the other one; `first`: in this order."""
    measured: list[tuple[int, LinkSpeed]] = []
    for measuring in (first, not first):
        if measuring:
            measured.append((peer, probe.measure(peer, budget_s, arena.block_bytes)))
            probe.end(peer)
        else:
            probe.answer(peer, range(NUM_BLOCKS))
    return measured


def _packed(layout: HostLayout, rows: list[tuple[int, LinkSpeed]], worker: int) -> LinksMeasured:
    own = layout.host_of[worker - 1]
    return LinksMeasured(
        host_of=layout.host_of,
        srcs=(own,) * len(rows),
        dsts=tuple(layout.host_of[peer - 1] for peer, _ in rows),
        latency_s=tuple(m.latency_s for _, m in rows),
        Bps=tuple(m.Bps for _, m in rows),
    )


def _collect(probe: Probe, layout: HostLayout, workers: list[int]) -> LinksMeasured:
    """Receive the results of these workers. A link within a host gets the slower direction."""
    links: dict[tuple[int, int], LinkSpeed] = {}
    for worker in workers:
        try:
            part = probe.receive(worker, LinksMeasured)
        except PeerLost:
            continue
        rows = zip(part.srcs, part.dsts, part.latency_s, part.Bps, strict=True)
        for src, dst, latency_s, Bps in rows:
            known = links.get((src, dst), LinkSpeed(latency_s, Bps))
            links[src, dst] = LinkSpeed(max(latency_s, known.latency_s), min(Bps, known.Bps))
    keys = sorted(links)
    return LinksMeasured(
        host_of=layout.host_of,
        srcs=tuple(src for src, _ in keys),
        dsts=tuple(dst for _, dst in keys),
        latency_s=tuple(links[key].latency_s for key in keys),
        Bps=tuple(links[key].Bps for key in keys),
    )


def _put_back(probe: Probe) -> None:
    """Let the next `poll` return the messages that do not belong to the measurement."""
    if probe.other_messages:
        probe.transport.unread(probe.other_messages)
