"""Latency and bandwidth between hosts: measured at the start, updated by every migration."""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from mellmpi.protocol import LinksMeasured

WINDOW = 5  # newest samples: their median changes with the third new value, not with the first
STALE_S = 10.0  # a link unused for this long gets one sample of its initial estimate
SMALL = 2.0  # latencies: transfers expected to take less update the latency, not the bandwidth


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two hosts, or within one."""

    latency_s: float
    Bps: float  # bytes a second, once the latency has passed

    def transfer_s(self, num_bytes: int) -> float:
        """Seconds to transfer `num_bytes`."""
        return self.latency_s + num_bytes / self.Bps


@dataclass(slots=True)
class _Samples:
    """The newest measurements of one link."""

    initial: Link  # measured at the start, or guessed
    byte_s: deque[float]
    latency_s: deque[float]
    used_s: float = 0.0  # time of the last transfer

    @property
    def link(self) -> Link:
        return Link(median(self.latency_s), 1 / max(median(self.byte_s), 1e-15))


def _samples(link: Link, certain: bool) -> _Samples:
    """A measured link fills the whole window; a guess (not `certain`) counts as one sample."""
    copies = WINDOW if certain else 1
    return _Samples(
        link, deque([1 / link.Bps] * copies, WINDOW), deque([link.latency_s] * copies, WINDOW)
    )


@dataclass(slots=True)
class Links:
    """All links of a job, by pair of hosts; `guess` stands for those never measured."""

    guess: Link
    _host_of: tuple[int, ...] = ()
    _links: dict[tuple[int, int], _Samples] = field(default_factory=dict)

    def measured(self, message: LinksMeasured) -> None:
        """Store the measurements made at the start."""
        self._host_of = message.host_of
        rows = zip(message.srcs, message.dsts, message.latency_s, message.Bps, strict=True)
        self._links = {
            (src, dst): _samples(Link(latency_s, Bps), certain=True)
            for src, dst, latency_s, Bps in rows
        }

    def hosts(self, src: int, dst: int) -> tuple[int, int]:
        """The hosts of two workers; (0, 0) for workers whose host is unknown."""
        if max(src, dst) > len(self._host_of):
            return 0, 0
        return self._host_of[src - 1], self._host_of[dst - 1]

    def between(self, src: int, dst: int) -> Link:
        """The estimated link from worker `src` to worker `dst`."""
        samples = self._links.get(self.hosts(src, dst))
        return samples.link if samples is not None else self.guess

    def bandwidths(self) -> list[tuple[int, int, float]]:
        """(source host, destination host, bytes a second) of every link with a sample."""
        return [(src, dst, s.link.Bps) for (src, dst), s in sorted(self._links.items())]

    def record_transfer(
        self, src: int, dst: int, num_bytes: int, transfer_s: float, now: float
    ) -> None:
        """Add a transfer's sample; `num_bytes` includes transfers that shared the link with it."""
        if num_bytes <= 0 or transfer_s <= 0:
            return
        hosts = self.hosts(src, dst)
        samples = self._links.setdefault(hosts, _samples(self.guess, certain=False))
        samples.used_s = now
        link = samples.link
        if (
            num_bytes / link.Bps < SMALL * link.latency_s
            and transfer_s < 2 * SMALL * link.latency_s
        ):
            samples.latency_s.append(max(0.0, transfer_s - num_bytes / link.Bps))
        else:
            bytes_s = max(transfer_s - link.latency_s, 0.1 * transfer_s)
            samples.byte_s.append(bytes_s / num_bytes)

    def forget_stale(self, now: float) -> None:
        """Add a sample of the initial estimate to every link unused for `STALE_S`.

        A link that was slow for a while is then used again.
        """
        for samples in self._links.values():
            if now - samples.used_s >= STALE_S:
                samples.used_s = now
                samples.byte_s.append(1 / samples.initial.Bps)
                samples.latency_s.append(samples.initial.latency_s)
