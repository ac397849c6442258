"""What the links between hosts carry: measured at the start, then by every migration."""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from mellmpi.protocol import LinksMeasured

WINDOW = 5  # newest samples; their median moves with the third of them, and not with the first
LOOK_AGAIN_S = 10.0  # a link that nothing used for so long is believed a little better again
SMALL = 2.0  # latencies: a transfer that should take less says something of the latency alone


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two hosts, or within one."""

    latency_s: float  # of a transfer, before its bytes
    Bps: float  # bytes a second beyond that

    def transfer_s(self, num_bytes: int) -> float:
        """Blocks of so many bytes."""
        return self.latency_s + num_bytes / self.Bps


@dataclass(slots=True)
class _Samples:
    """The newest few of what one link took."""

    start: Link  # as at the start, or as guessed
    byte_s: deque[float]
    latency_s: deque[float]
    seen_s: float = 0.0  # when something was last sent over it

    @property
    def link(self) -> Link:
        return Link(median(self.latency_s), 1 / max(median(self.byte_s), 1e-15))


def _samples(link: Link, certain: bool) -> _Samples:
    copies = WINDOW if certain else 1
    return _Samples(
        link, deque([1 / link.Bps] * copies, WINDOW), deque([link.latency_s] * copies, WINDOW)
    )


@dataclass(slots=True)
class Links:
    """All links of a job, by hosts. What was never measured is guessed to be like `guess`."""

    guess: Link
    _host_of: tuple[int, ...] = ()
    _links: dict[tuple[int, int], _Samples] = field(default_factory=dict)

    def measured(self, message: LinksMeasured) -> None:
        """Take over what was measured at the start."""
        self._host_of = message.host_of
        rows = zip(message.srcs, message.dsts, message.latency_s, message.Bps, strict=True)
        self._links = {
            (src, dst): _samples(Link(latency_s, Bps), certain=True)
            for src, dst, latency_s, Bps in rows
        }

    def hosts(self, src: int, dst: int) -> tuple[int, int]:
        """The pair of hosts that two workers are on; all on one until we know better."""
        if max(src, dst) > len(self._host_of):
            return 0, 0
        return self._host_of[src - 1], self._host_of[dst - 1]

    def between(self, src: int, dst: int) -> Link:
        """What to expect from worker to worker."""
        samples = self._links.get(self.hosts(src, dst))
        return samples.link if samples is not None else self.guess

    def moved(self, src: int, dst: int, num_bytes: int, transfer_s: float, now: float) -> None:
        """A transfer took so long; `num_bytes` are all that shared the link with it."""
        if num_bytes <= 0 or transfer_s <= 0:
            return
        hosts = self.hosts(src, dst)
        samples = self._links.setdefault(hosts, _samples(self.guess, certain=False))
        samples.seen_s = now
        link = samples.link
        if (
            num_bytes / link.Bps < SMALL * link.latency_s
            and transfer_s < 2 * SMALL * link.latency_s
        ):
            samples.latency_s.append(max(0.0, transfer_s - num_bytes / link.Bps))
        else:
            beyond_s = max(transfer_s - link.latency_s, 0.1 * transfer_s)
            samples.byte_s.append(beyond_s / num_bytes)

    def look_again(self, now: float) -> None:
        """Links that seemed slow and that nobody uses any more may have recovered."""
        for samples in self._links.values():
            if now - samples.seen_s >= LOOK_AGAIN_S:
                samples.seen_s = now
                samples.byte_s.append(1 / samples.start.Bps)
                samples.latency_s.append(samples.start.latency_s)
