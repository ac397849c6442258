"""How fast the links between workers are: measured at the start, host by host, with real transfers.

All workers of a job run `measure_links` together. Hosts meet in pairs, each with one other at a
time, and every pair has the same share of the time. One worker speaks for its host; a host's own
link (shared memory) is measured between its first two workers.
"""

import mmap
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mellmpi.protocol import SCHEDULER, LinkProbe, LinkProbed, LinksMeasured, WorkerLost
from mellmpi.transport.base import Arena, Transfer, Transport

LIMIT_S = 1.0  # for all pairs of hosts together
BLOCK_BYTES = 512 << 10
NUM_BLOCKS = 32  # of the largest transfer of a probe
SMALL_SHARE = 0.1  # of a direction's time goes to small messages
REPEATS = 3  # of the largest transfer that fits
SLEEP_S = 1.0  # longest wait between looks: whatever comes ends it
TAG = 0  # assignments begin at epoch 1


class HostArena:
    """Blocks in ordinary memory, for probes. Laid out as KV is: copies from or to what begins
    beside a page take half as long again."""

    device = "cpu"

    def __init__(self, num_blocks: int, block_bytes: int):
        memory = mmap.mmap(-1, num_blocks * block_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.blocks = np.frombuffer(memory, np.uint8).reshape(num_blocks, block_bytes)
        self.blocks[:] = 1  # resident, not just promised
        self.num_blocks, self.block_bytes = num_blocks, block_bytes
        self.address = self.blocks.ctypes.data


class PeerLost(Exception):
    """The other end of a probe will never answer."""


@dataclass(frozen=True)
class Measured:
    """One direction of one link."""

    latency_s: float  # one way, of a small message
    Bps: float  # of blocks in flight, beyond the latency


class Probe:
    """Measures links of one worker; everything that comes meanwhile and is not ours is kept."""

    def __init__(self, transport: Transport):
        self.transport = transport
        self.kept: list[tuple[int, Any]] = []
        self.lost: set[int] = set()
        self._came: list[tuple[int, Any]] = []

    def hear(self, src: int, kinds: type | tuple[type, ...]) -> Any:
        """The next probe message from `src`; raises PeerLost."""
        while True:
            for i, (source, message) in enumerate(self._came):
                if source == src and isinstance(message, kinds):
                    del self._came[i]
                    return message
            if src in self.lost:
                raise PeerLost(src)
            self._look()

    def _look(self) -> None:
        messages = self.transport.poll()
        for source, message in messages:
            if isinstance(message, LinkProbe | LinkProbed | LinksMeasured):
                self._came.append((source, message))
                continue
            if isinstance(message, WorkerLost):
                self.lost.add(message.worker)
            self.kept.append((source, message))
        if not messages and not self.transport.progress():
            self.transport.wait(SLEEP_S)

    def _finish(self, transfer: Transfer) -> None:
        while not transfer.done:
            self._look()
        if transfer.failed:
            raise PeerLost

    # --- at the end that asks -------------------------------------------------------------------

    def round_trip_s(self, dst: int) -> float:
        """A small message there and its answer."""
        started_s = time.perf_counter()
        self.transport.send(dst, LinkProbe(0, False))
        self.hear(dst, LinkProbed)
        return time.perf_counter() - started_s

    def transfer_s(self, dst: int, block_ids: Sequence[int]) -> float:
        """These blocks of the attached arena, behind a header as in a migration, and its answer."""
        started_s = time.perf_counter()
        self.transport.send(dst, LinkProbe(len(block_ids), False))
        transfer = self.transport.send_blocks(dst, TAG, block_ids)
        self.hear(dst, LinkProbed)
        elapsed_s = time.perf_counter() - started_s
        self._finish(transfer)
        return elapsed_s

    def measure(self, dst: int, budget_s: float, block_bytes: int) -> Measured:
        """The link to `dst`, in about `budget_s`; the attached arena holds NUM_BLOCKS blocks."""
        stop_s = time.perf_counter() + budget_s
        small_until_s = time.perf_counter() + SMALL_SHARE * budget_s
        trips = [self.round_trip_s(dst) for _ in range(2)][1:]  # the first opens the connection
        while time.perf_counter() < small_until_s and len(trips) < 100:
            trips.append(self.round_trip_s(dst))
        trip_s = statistics.median(trips)
        num_blocks, spent_s = 1, self.transfer_s(dst, range(1))
        took = [self.transfer_s(dst, range(1))]
        while num_blocks < NUM_BLOCKS and time.perf_counter() + 3 * took[-1] < stop_s:
            num_blocks *= 2
            took = [self.transfer_s(dst, range(num_blocks))]
        while len(took) < REPEATS and time.perf_counter() + took[-1] < stop_s:
            took.append(self.transfer_s(dst, range(num_blocks)))
        spent_s = statistics.median(took) - trip_s
        num_bytes = num_blocks * block_bytes
        return Measured(trip_s / 2, num_bytes / max(spent_s, 0.1 * statistics.median(took)))

    def release(self, dst: int) -> None:
        """There is nothing more to answer."""
        self.transport.send(dst, LinkProbe(0, True))

    # --- at the end that answers ----------------------------------------------------------------

    def answer(self, src: int, places: Sequence[int]) -> None:
        """Answer every probe of `src` until it lets us go; blocks come into `places`, in order."""
        while not (probe := self.hear(src, LinkProbe)).done:
            if probe.num_blocks:
                transfer = self.transport.receive_blocks(src, TAG, places[: probe.num_blocks])
                self._finish(transfer)
            self.transport.send(src, LinkProbed())


@dataclass(frozen=True)
class Places:
    """Where workers are: `host_of[worker - 1]` is the index of its host, in order of appearance."""

    host_of: tuple[int, ...]

    @staticmethod
    def of(hosts: Sequence[str]) -> "Places":
        """`hosts`: the name of every address's host, the scheduler's first."""
        names = list(dict.fromkeys(hosts[1:]))
        return Places(tuple(names.index(host) for host in hosts[1:]))

    @property
    def num_hosts(self) -> int:
        return max(self.host_of, default=-1) + 1

    def workers_on(self, host: int) -> list[int]:
        return [i + 1 for i, other in enumerate(self.host_of) if other == host]

    def rounds(self) -> Iterator[list[tuple[int, int]]]:
        """Pairs of workers, disjoint within a round: first each host with itself, then with others.

        (The circle method: one host keeps its place, the others go round.)
        """
        own = [self.workers_on(host) for host in range(self.num_hosts)]
        yield [(workers[0], workers[1]) for workers in own if len(workers) > 1]
        speakers: list[int | None] = [workers[0] for workers in own]
        if len(speakers) % 2:
            speakers.append(None)
        for _ in range(len(speakers) - 1):
            pairs = zip(speakers[: len(speakers) // 2], reversed(speakers), strict=False)
            yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
            speakers = [speakers[0], speakers[-1], *speakers[1:-1]]


def measure_links(
    transport: Transport, hosts: Sequence[str], limit_s: float = LIMIT_S, arena: Arena | None = None
) -> LinksMeasured | None:
    """Measure the links between all hosts, both ways; the whole of it at the scheduler, else None.

    Called at every address before anything else is sent. Takes about `limit_s`. A lost worker's
    links are left out.

    hosts  the host of every address, the scheduler's first
    arena  NUM_BLOCKS blocks or more, such as migrations will move; None: host memory of our own
    """
    places, probe = Places.of(hosts), Probe(transport)
    rounds = [pairs for pairs in places.rounds() if pairs]
    if transport.worker == SCHEDULER:
        talkers = sorted({worker for pairs in rounds for pair in pairs for worker in pair})
        measured = _collect(probe, places, talkers)
        _give_back(transport, probe)
        return measured
    arena = arena or HostArena(NUM_BLOCKS, BLOCK_BYTES)
    transport.attach(arena)
    rows = []
    budget_s = limit_s / max(1, 2 * len(rounds))
    for a, b in (pair for pairs in rounds for pair in pairs if transport.worker in pair):
        peer = b if transport.worker == a else a
        try:
            rows += _meet(probe, peer, transport.worker == a, budget_s, arena)
        except PeerLost:
            continue
    transport.attach(None)
    if any(transport.worker in pair for pairs in rounds for pair in pairs):
        transport.send(SCHEDULER, _packed(places, rows, transport.worker))
    _give_back(transport, probe)
    return None


def _meet(
    probe: Probe, peer: int, first: bool, budget_s: float, arena: Arena
) -> list[tuple[int, Measured]]:
    """Both ends of a pair ask in turn."""
    measured: list[tuple[int, Measured]] = []
    for asking in (first, not first):
        if asking:
            measured.append((peer, probe.measure(peer, budget_s, arena.block_bytes)))
            probe.release(peer)
        else:
            probe.answer(peer, range(NUM_BLOCKS))
    return measured


def _packed(places: Places, rows: list[tuple[int, Measured]], worker: int) -> LinksMeasured:
    own = places.host_of[worker - 1]
    return LinksMeasured(
        host_of=places.host_of,
        srcs=(own,) * len(rows),
        dsts=tuple(places.host_of[peer - 1] for peer, _ in rows),
        latency_s=tuple(m.latency_s for _, m in rows),
        Bps=tuple(m.Bps for _, m in rows),
    )


def _collect(probe: Probe, places: Places, talkers: list[int]) -> LinksMeasured:
    """What all of them found; the two directions of a host's own link become one, the slower."""
    links: dict[tuple[int, int], Measured] = {}
    for worker in talkers:
        try:
            part = probe.hear(worker, LinksMeasured)
        except PeerLost:
            continue
        rows = zip(part.srcs, part.dsts, part.latency_s, part.Bps, strict=True)
        for src, dst, latency_s, Bps in rows:
            known = links.get((src, dst), Measured(latency_s, Bps))
            links[src, dst] = Measured(max(latency_s, known.latency_s), min(Bps, known.Bps))
    keys = sorted(links)
    return LinksMeasured(
        host_of=places.host_of,
        srcs=tuple(src for src, _ in keys),
        dsts=tuple(dst for _, dst in keys),
        latency_s=tuple(links[key].latency_s for key in keys),
        Bps=tuple(links[key].Bps for key in keys),
    )


def _give_back(transport: Transport, probe: Probe) -> None:
    """What others said meanwhile is the next `poll`'s."""
    if probe.kept:
        transport.unread(probe.kept)
